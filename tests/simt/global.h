// Global memory: which addresses a kernel may touch, and who wrote what during the launch.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "shared.h"

namespace simt {

// What the threads of one block wrote is ordered for others by a barrier within the block, and between blocks by a counter: the
// adding thread passes on what is ordered before it, and takes over what adders before it passed on.
class Global {
public:
    void allow(uintptr_t address, size_t bytes, const std::string& name, bool writable);
    void forget(uintptr_t address);
    void begin_launch();
    void begin_block(uint32_t number) { block_ = number + 1, taken_over_.clear(); }

    enum class Reading { ordinary, constant };  // constant: by a path that doesn't see writes of the launch
    void check_read(int thread, const void* from, size_t bytes, size_t alignment, Reading reading, Site site);
    void check_write(int thread, const void* to, size_t bytes, Site site);  // aligned to its size
    void meet(int thread, const int* counter, Site site);

private:
    struct Write {
        uint32_t block;  // numbered from 1; 0: nobody's
        Shared::Stamp stamp;
    };
    struct FreeWrites {
        void operator()(Write* writes) const { free(writes); }
    };
    struct Range {
        uintptr_t begin, end;
        std::string name;
        bool writable;
        std::unique_ptr<Write[], FreeWrites> writes;  // by byte; null until the launch writes
    };
    using Knowledge = std::map<uint32_t, Clock>;  // by block: up to which moment its agents' writes are seen
    struct Takeover {
        Shared::Stamp stamp;
        Knowledge knowledge;
    };

    Range* below(uintptr_t address);
    Range& find(int thread, const void* pointer, size_t bytes, size_t alignment, bool write, Site site);
    bool ordered(Write write, int thread) const;

    std::map<uintptr_t, Range> ranges_;  // by their first address
    Range* latest_ = nullptr;            // most accesses fall into the range of the one before
    uint32_t block_ = 0;
    std::map<const void*, Knowledge> counters_;
    std::vector<Takeover> taken_over_;  // by the running block
};
extern Global global;

}  // namespace simt
