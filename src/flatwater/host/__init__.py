"""What a CPU host needs to train fast: found out, said, and put into effect.

Three things decide the speed of a convolutional training step on an ordinary CPU machine. All three are read once, when
a process starts or first uses a library, so their place is the environment of the process and not its code:

* **glibc's allocator** hands every large block back to the kernel when it is freed, and the next tensor pays for fresh
  pages. Raising its thresholds keeps activations in the process.
* **Threads**: one OpenMP thread per processor this process may use, which inside a container with a CPU limit is less
  than the machine has; one per core where processors share cores (hyper-threading). Left alone, Paddle takes one, and
  Flatwater's kernels one per processor within that limit.
* **MKL on AMD**: the MKL inside Paddle's CPU wheel takes a slow path on processors that are not Intel's, unless it is
  told which one to take: that of AVX-512 where the processor has it, else that of AVX2.

``flatwater run -- COMMAND`` starts a command with what is missing (:func:`launch`), ``flatwater host`` shows it, and
:func:`tune` does, in a process that runs already, what can still be done. What the user has set is never changed.
"""

from flatwater.host.facts import Host, usable_processors
from flatwater.host.settings import Decision, Setting, State, decisions, launch, missing, present, settings, standing
from flatwater.host.tune import Effect, tune

__all__ = [
    "Decision",
    "Effect",
    "Host",
    "Setting",
    "State",
    "decisions",
    "launch",
    "missing",
    "present",
    "settings",
    "standing",
    "tune",
    "usable_processors",
]
