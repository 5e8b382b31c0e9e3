// Integers of 8 bits with fp16 or bf16 scales.
#include "instances.h"

namespace quantlib::cuda {

template <class T>
using Int8 = Integer<T, 8>;

void add_int8(Instances& found) { add_instances<Int8, Int8, Scaling::half>(found, "int8", "half"); }

}  // namespace quantlib::cuda
