// Integers of 2 bits with fp16 or bf16 scales.
#include "instances.h"

namespace quantlib::cuda {

template <class T>
using Int2 = Integer<T, 2>;

void add_int2(Instances& found) { add_instances<Int2, Int2, Scaling::half>(found, "int2", "half"); }

}  // namespace quantlib::cuda
