// The instances of the kernels of this folder: what each is for, and how it is launched. Host code only.
#pragma once

#include <string>
#include <vector>

#include "../common/weight.h"

namespace quantlib::cuda {

// One instance. codec: "int2" .. "int8", "table", "float4", "e4m3", "e5m2"; scaling: see Scaling (scales.h).
template <class Arguments>
struct Variant {
    std::string codec, scaling, dtype;
    int rows;     // of x or dY in a block
    int columns;  // of y or dX in a block
    int depth;    // of the reduction in a turn
    int threads, shared_bytes;
    void (*launch)(const Arguments&, int programs, void* stream);
};

using LinearVariant = Variant<LinearArguments>;
using DgradVariant = Variant<DgradArguments>;

struct Instances {
    std::vector<LinearVariant> gemv, linear;
    std::vector<DgradVariant> dgrad;
};

// One file of instances each; they add to what is there.
void add_int2(Instances& found);
void add_int3(Instances& found);
void add_int4(Instances& found);
void add_int8(Instances& found);
void add_table(Instances& found);
void add_float4(Instances& found);
void add_float8(Instances& found);

inline Instances all_instances() {
    Instances found;
    for (auto add : {add_int2, add_int3, add_int4, add_int8, add_table, add_float4, add_float8}) add(found);
    return found;
}

}  // namespace quantlib::cuda
