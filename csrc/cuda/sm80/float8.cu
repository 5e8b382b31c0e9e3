// FP8 with scales per row, per tensor or per 2-D block.
#include "instances.h"

namespace quantlib::cuda {

template <class T>
using E4M3 = Float8<T, 4>;
template <class T>
using E5M2 = Float8<T, 5>;

void add_float8(Instances& found) {
    add_instances<E4M3, E4M3, Scaling::grid>(found, "e4m3", "grid");
    add_instances<E5M2, E5M2, Scaling::grid>(found, "e5m2", "grid");
}

}  // namespace quantlib::cuda
