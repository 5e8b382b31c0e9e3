// Integers of 3 bits with fp16 or bf16 scales.
#include "instances.h"

namespace quantlib::cuda {

template <class T>
using Int3 = Integer<T, 3>;

void add_int3(Instances& found) { add_instances<Int3, Int3, Scaling::half>(found, "int3", "half"); }

}  // namespace quantlib::cuda
