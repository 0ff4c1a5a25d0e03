#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <new>

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

// What an idle block holds: its places in two lists.
struct Idle {
    Idle *older, *newer;            // by when it was released
    Idle *older_same, *newer_same;  // the same, among those of its size
    std::size_t size;
};
static_assert(sizeof(Idle) <= alignment);

// For blocks that left their lists as a chain of older ones: the system is called when the pool is unlocked.
void give_back(Idle *chain) {
    while (chain) {
        Idle *const next = chain->older;
        give_back(chain, chain->size);
        chain = next;
    }
}

// --- The pool --------------------------------------------------------------------------------------------

struct Pool {
    std::mutex mutex;
    // Of each size the idle block released last. Each that was ever taken has an entry: release() may need no memory.
    std::map<std::size_t, Idle *> newest_of;
    Idle *oldest = nullptr, *newest = nullptr;
    std::optional<std::size_t> limit;
    std::size_t held = 0, in_use = 0, peak = 0;
    std::uint64_t hits = 0, misses = 0;

    void use(std::size_t size) {
        in_use += size;
        peak = std::max(peak, in_use);
    }

    // The smallest idle block of at least this size, null if that is more than twice as large.
    Idle *take_idle(std::size_t size) {
        for (auto i = newest_of.lower_bound(size); i != newest_of.end() && i->first <= 2 * size; ++i)
            if (Idle *const last = i->second) {  // it may still be in a cache
                unlink(last);
                return last;
            }
        return nullptr;
    }

    void keep(void *block, std::size_t size) {
        Idle *&newest_same = newest_of.find(size)->second;
        auto *const kept = new (block) Idle{newest, nullptr, newest_same, nullptr, size};
        (newest ? newest->newer : oldest) = kept;
        if (newest_same) newest_same->newer_same = kept;
        newest = newest_same = kept;
    }

    // Takes the blocks that have been idle for longest, until what is held is no more than may be with so much in use.
    Idle *shrink(std::size_t used) {
        const auto too_much = [&] { return limit ? held - used > *limit : held > 2 * std::max(peak, used); };
        Idle *chain = nullptr;
        while (oldest && too_much()) chain = take_oldest(chain);
        return chain;
    }

    Idle *empty() {
        Idle *chain = nullptr;
        while (oldest) chain = take_oldest(chain);
        return chain;
    }

  private:
    void unlink(const Idle *block) {
        (block->older ? block->older->newer : oldest) = block->newer;
        (block->newer ? block->newer->older : newest) = block->older;
        if (block->older_same) block->older_same->newer_same = block->newer_same;
        (block->newer_same ? block->newer_same->older_same : newest_of.find(block->size)->second) = block->older_same;
    }

    Idle *take_oldest(Idle *chain) {
        Idle *const block = oldest;
        unlink(block);
        held -= block->size;
        block->older = chain;
        return block;
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

Block allocate(std::size_t bytes) {
    if (bytes > largest) throw std::bad_alloc();
    const std::size_t size = size_class(bytes);
    Pool &pool = the_pool();
    Idle *surplus;
    {
        const std::lock_guard lock(pool.mutex);
        if (Idle *const block = pool.take_idle(size)) {
            ++pool.hits;
            pool.use(size);
            return {block, block->size, size};
        }
        pool.newest_of.try_emplace(size);
        ++pool.misses;
        pool.held += size;  // what has to go for it goes first
        surplus = pool.shrink(pool.in_use + size);
    }
    give_back(surplus);
    void *block = obtain(size);
    if (!block && trim()) block = obtain(size);
    const std::lock_guard lock(pool.mutex);
    if (!block) {
        pool.held -= size;
        throw std::bad_alloc();
    }
    pool.use(size);
    return {block, size, size};
}

void release(const Block &block) noexcept {
    Pool &pool = the_pool();
    Idle *surplus;
    {
        const std::lock_guard lock(pool.mutex);
        pool.keep(block.begin, block.size);
        pool.in_use -= block.in_use;
        surplus = pool.shrink(pool.in_use);
    }
    give_back(surplus);
}

std::size_t trim() noexcept {
    Pool &pool = the_pool();
    Idle *all;
    std::size_t bytes;
    {
        const std::lock_guard lock(pool.mutex);
        bytes = pool.held;
        all = pool.empty();
        bytes -= pool.held;
        pool.peak = pool.in_use;
    }
    give_back(all);
    return bytes;
}

void set_limit(std::optional<std::size_t> bytes) noexcept {
    Pool &pool = the_pool();
    Idle *surplus;
    {
        const std::lock_guard lock(pool.mutex);
        pool.limit = bytes;
        surplus = pool.shrink(pool.in_use);
    }
    give_back(surplus);
}

Statistics statistics() noexcept {
    Pool &pool = the_pool();
    const std::lock_guard lock(pool.mutex);
    return {pool.in_use, pool.held - pool.in_use, pool.peak, pool.limit.value_or(2 * pool.peak - pool.in_use),
            pool.hits,   pool.misses};
}

}  // namespace flatwater::pool
