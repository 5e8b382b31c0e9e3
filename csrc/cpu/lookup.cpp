// Products by byte look-ups. Compiled once, for AVX2 (build_tools/cpu.py): the tables of functions of two instruction sets hold them.
#include "lookup_dot.h"
#include "lookup_tile.h"

namespace quantlib::cpu::QUANTLIB_ISA {

bool lookup_dot(const Joined<LinearCall>& joined) { return multiply_dots(joined); }
bool lookup_tile(const LinearCall& call) { return multiply_tiles(call); }

}  // namespace quantlib::cpu::QUANTLIB_ISA
