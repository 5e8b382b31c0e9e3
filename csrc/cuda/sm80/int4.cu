// Integers of 4 bits with fp16 or bf16 scales.
#include "instances.h"

namespace quantlib::cuda {

template <class T>
using Int4 = Integer<T, 4>;

void add_int4(Instances& found) { add_instances<Int4, Int4, Scaling::half>(found, "int4", "half"); }

}  // namespace quantlib::cuda
