// The emulator's part that ptx90.h calls.
#pragma once

#include "simt.h"

namespace simt {

// A matrix in global memory and the box that one copy brings, in elements.
struct TensorMap {
    const void* base = nullptr;
    int64_t rows = 0, columns = 0, row_bytes = 0;
    int element_bytes = 0, box_rows = 0, box_columns = 0;
    bool swizzled = false;
};

void barrier_init(uint64_t* barrier, int arrivals, Site site);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier, int bytes, Site site);  // bytes: announced with the arrival
void barrier_wait(uint64_t* barrier, int parity, Site site);
void sync_group(int id, int threads, Site site);
void fence_proxy_async();

void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Site site);
void copy_tensor(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier, Site site);

uint64_t shared_offset(const void* pointer);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int last, Site site);
void wgmma(Kind kind, int columns, float* d, const uint32_t* a, uint64_t descriptor, Site site);
void wgmma_e4m3(int columns, float* d, uint64_t a, uint64_t b, Site site);

bool elect(Site site);

}  // namespace simt
