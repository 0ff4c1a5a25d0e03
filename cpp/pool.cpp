#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace flatwater::pool {
namespace {

constexpr std::size_t alignment = 64;             // a cache line, and the widest vector
constexpr std::size_t huge_page = 2 << 20;        // of x86-64, and of ARM with 4 KiB pages
constexpr std::size_t mapped_from = 128 << 10;    // smaller blocks are left to the C++ library
constexpr std::size_t largest = PTRDIFF_MAX / 2;  // so that no size below overflows

std::size_t round_up(std::size_t size, std::size_t unit) { return (size + unit - 1) / unit * unit; }

// Eight sizes between one power of two and the next.
std::size_t size_class(std::size_t bytes) {
    bytes = std::max(bytes, alignment);
    return round_up(bytes, std::max(std::bit_floor(bytes) / 8, alignment));
}

// --- The system: null if it has no more ------------------------------------------------------------------

std::size_t mapped_size(std::size_t size) {
    static const auto page = std::size_t(sysconf(_SC_PAGESIZE));
    return round_up(size, page);
}

// Not from malloc: a program that has been told to keep its memory (MALLOC_TRIM_THRESHOLD_) would keep this too.
void *map(std::size_t size) {
    const std::size_t length = mapped_size(size), spare = size < huge_page ? 0 : huge_page;
    void *mapping = mmap(nullptr, length + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    if (!spare) return mapping;
    auto *const begin = static_cast<std::byte *>(mapping);
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(begin) % huge_page;
    if (before) munmap(begin, before);
    munmap(begin + before + length, spare - before);  // begin is on a page, so before < spare: something is left
#ifdef MADV_HUGEPAGE
    madvise(begin + before, length, MADV_HUGEPAGE);  // advice: a kernel without huge pages may refuse it
#endif
    return begin + before;
}

void *obtain(std::size_t size) {
    return size < mapped_from ? ::operator new(size, std::align_val_t(alignment), std::nothrow) : map(size);
}

void give_back(void *block, std::size_t size) {
    if (size < mapped_from)
        ::operator delete(block, std::align_val_t(alignment));
    else
        munmap(block, mapped_size(size));
}

// Blocks on their way back, chained through their own memory: the system is called when the pool is unlocked.
struct Chain {
    Chain *next;
    std::size_t size;
};

void give_back(Chain *chain) {
    while (chain) {
        const Chain link = *chain;
        give_back(chain, link.size);
        chain = link.next;
    }
}

// --- The pool --------------------------------------------------------------------------------------------

struct Idle {
    void *block;
    std::uint64_t since;  // in releases
};

struct SizeClass {
    std::vector<Idle> idle;  // the one idle for longest first; its room is for all blocks, so it never grows
    std::size_t blocks = 0;  // idle and in use
};

struct Pool {
    std::mutex mutex;
    std::map<std::size_t, SizeClass> classes;
    std::optional<std::size_t> limit;
    std::size_t in_use = 0, idle = 0, peak = 0;
    std::uint64_t hits = 0, misses = 0, releases = 0;

    std::size_t idle_limit() const { return limit.value_or(peak); }

    void use(std::size_t size) {
        in_use += size;
        peak = std::max(peak, in_use);
    }

    void *take_idle(std::size_t size) {
        const auto found = classes.find(size);
        if (found == classes.end() || found->second.idle.empty()) return nullptr;
        void *const block = found->second.idle.back().block;  // what was released last may still be in a cache
        found->second.idle.pop_back();
        idle -= size;
        return block;
    }

    // Room for the return of one more block.
    void expect(std::size_t size) {
        SizeClass &its = classes[size];
        if (its.blocks == its.idle.capacity()) its.idle.reserve(2 * its.blocks + 1);
        ++its.blocks;
    }

    void forget(std::map<std::size_t, SizeClass>::iterator of) {
        if (--of->second.blocks == 0) classes.erase(of);
    }

    // Takes the blocks that have been idle for longest, until no more than `bytes` are.
    Chain *shrink(std::size_t bytes) {
        Chain *chain = nullptr;
        while (idle > bytes) {
            auto oldest = classes.end();
            for (auto i = classes.begin(); i != classes.end(); ++i)
                if (!i->second.idle.empty() &&
                    (oldest == classes.end() || i->second.idle.front().since < oldest->second.idle.front().since))
                    oldest = i;
            const std::size_t size = oldest->first;
            chain = new (oldest->second.idle.front().block) Chain{chain, size};
            oldest->second.idle.erase(oldest->second.idle.begin());
            idle -= size;
            forget(oldest);
        }
        return chain;
    }
};

// Never destroyed: a tensor may outlive this module, and every other static object of the process.
// A child of fork() gets it unlocked and whole, with blocks of its own, whatever other threads were doing.
Pool &the_pool() {
    static Pool *const pool = [] {
        pthread_atfork([] { the_pool().mutex.lock(); }, [] { the_pool().mutex.unlock(); },
                       [] { the_pool().mutex.unlock(); });
        return new Pool;
    }();
    return *pool;
}

}  // namespace

void *allocate(std::size_t bytes) {
    if (bytes > largest) throw std::bad_alloc();
    const std::size_t size = size_class(bytes);
    Pool &pool = the_pool();
    {
        const std::lock_guard lock(pool.mutex);
        if (void *const block = pool.take_idle(size)) {
            ++pool.hits;
            pool.use(size);
            return block;
        }
        pool.expect(size);
        ++pool.misses;
    }
    void *block = obtain(size);
    if (!block && trim()) block = obtain(size);
    const std::lock_guard lock(pool.mutex);
    if (!block) {
        pool.forget(pool.classes.find(size));
        throw std::bad_alloc();
    }
    pool.use(size);
    return block;
}

void release(void *block, std::size_t bytes) noexcept {
    const std::size_t size = size_class(bytes);
    Pool &pool = the_pool();
    Chain *surplus;
    {
        const std::lock_guard lock(pool.mutex);
        pool.classes.find(size)->second.idle.push_back({block, pool.releases++});
        pool.in_use -= size;
        pool.idle += size;
        surplus = pool.shrink(pool.idle_limit());
    }
    give_back(surplus);
}

std::size_t trim() noexcept {
    Pool &pool = the_pool();
    Chain *all;
    std::size_t bytes;
    {
        const std::lock_guard lock(pool.mutex);
        bytes = pool.idle;
        all = pool.shrink(0);
        pool.peak = pool.in_use;
    }
    give_back(all);
    return bytes;
}

void set_limit(std::optional<std::size_t> bytes) noexcept {
    Pool &pool = the_pool();
    Chain *surplus;
    {
        const std::lock_guard lock(pool.mutex);
        pool.limit = bytes;
        surplus = pool.shrink(pool.idle_limit());
    }
    give_back(surplus);
}

Statistics statistics() noexcept {
    Pool &pool = the_pool();
    const std::lock_guard lock(pool.mutex);
    return {pool.in_use, pool.idle, pool.peak, pool.idle_limit(), pool.hits, pool.misses};
}

}  // namespace flatwater::pool
