// Memory for the tensors that a kernel fills. Training asks for the same sizes in every step; what the C library
// hands back to the system in between costs a page fault for every 4 KiB of the next step. Here it stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace flatwater::pool {

struct Statistics {
    std::size_t in_use;  // bytes asked for, each time rounded up by at most an eighth, or 63
    std::size_t idle;    // what is held beyond that
    std::size_t peak;    // the most that was in use at once since the last trim()
    std::size_t limit;   // of `idle`
    std::uint64_t hits, misses;
};

struct Block {
    void *begin;
    std::size_t size, in_use;  // its own, and what of it counts as in use
};

// A block of at least `bytes`, with whatever it held before, on a 64-byte boundary (a 2 MiB boundary, for huge
// pages, if it is as large as one): the smallest idle one if that is at most twice too large. std::bad_alloc if there
// is none.
Block allocate(std::size_t bytes);

// Takes a block back, from any thread.
void release(const Block &block) noexcept;

// Gives all idle blocks back, forgets the peak, and says how many bytes that was.
std::size_t trim() noexcept;

// What may lie idle. Without a limit of its own that is as much as makes twice the peak with what is in use: enough
// that steps of one shape, or of shapes in turn, find what the ones before have freed. Beyond it the block idle for
// longest goes.
void set_limit(std::optional<std::size_t> bytes) noexcept;

Statistics statistics() noexcept;

}  // namespace flatwater::pool
