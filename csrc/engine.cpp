// The table of kernels of one instruction set. Compiled once for each, like attention.cpp and norm.cpp.
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

extern const Engine engine;
const Engine engine = {
    {forward_tiles, forward_scratch, forward_tile},
    backward_workspace,
    {{backward_delta_tiles, backward_delta_scratch, backward_delta_tile},
     {backward_tiles, backward_scratch, backward_tile},
     {backward_q_tiles, backward_q_scratch, backward_q_tile}},
    {norm_forward_tiles, norm_forward_scratch, norm_forward_tile},
    {norm_backward_tiles, norm_backward_scratch, norm_backward_tile},
};

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
