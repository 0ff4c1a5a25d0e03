// Memory for the tensors that a kernel fills. Training asks for the same sizes in every step; what the C library
// hands back to the system in between costs a page fault for every 4 KiB of the next step. Here it stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace flatwater::pool {

struct Statistics {
    std::size_t in_use, idle;  // bytes, as they were rounded up
    std::size_t peak;          // the most that was in use at once since the last trim()
    std::size_t limit;         // of `idle`
    std::uint64_t hits, misses;
};

// A block of at least `bytes`, with whatever it held before, on a 64-byte boundary (a 2 MiB boundary, for huge
// pages, if it is as large as one). At most an eighth more, or 63 bytes, is taken. std::bad_alloc if there is none.
void *allocate(std::size_t bytes);

// Takes a block back, from any thread; `bytes` as they were asked for.
void release(void *block, std::size_t bytes) noexcept;

// Gives all idle blocks back, forgets the peak, and says how many bytes that was.
std::size_t trim() noexcept;

// What may lie idle. Without a limit of its own that is the peak: enough that a step which frees everything finds
// everything again, and no more than the program was seen to need. Beyond it the block idle for longest goes.
void set_limit(std::optional<std::size_t> bytes) noexcept;

Statistics statistics() noexcept;

}  // namespace flatwater::pool
