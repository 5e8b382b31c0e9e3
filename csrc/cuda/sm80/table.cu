// Code books of 16 numbers (NF4, FP4), with fp32 scales or with scales that are quantized themselves.
#include "instances.h"

namespace quantlib::cuda {

void add_table(Instances& found) {
    add_instances<Table, WideTable, Scaling::single>(found, "table", "single");
    add_instances<Table, WideTable, Scaling::twice>(found, "table", "twice");
}

}  // namespace quantlib::cuda
