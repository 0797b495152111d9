// The table of the kernels of one instruction set, compiled once for each like the kernels.
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

extern const Engine engine;
#define KERNEL(name) {name##_tiles, name##_scratch, name##_tile}
const Engine engine = {
    {forward_workspace, {KERNEL(forward), KERNEL(decode), KERNEL(merge)}},
    {backward_workspace, {KERNEL(backward_delta), KERNEL(backward), KERNEL(backward_q), KERNEL(backward_bias)}},
    {nullptr, {KERNEL(jvp)}},
    {backward_workspace, {KERNEL(backward_delta), KERNEL(hvp), KERNEL(backward_q), KERNEL(hvp_bias)}},
    {nullptr, {KERNEL(norm_forward)}},
    {norm_backward_workspace, {KERNEL(norm_backward), KERNEL(norm_parameters)}},
    {nullptr, {KERNEL(linear)}},
    {nullptr, {KERNEL(rotary)}},
    peak_fma_probe,
    read_bandwidth_probe,
    exp2_probe,
};

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
