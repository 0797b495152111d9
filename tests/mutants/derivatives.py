"""Faults of derivatives beyond the first gradients, and of vmap."""

from .mutant import Mutant

ATTENTION = "tests/derivatives/test_attention.py::test_against_float64"
CALLS = "tests/derivatives/test_calls.py::"
TRANSFORMS = "tests/derivatives/test_transforms.py::"

MUTANTS = [
    Mutant(
        "the tangent of a sink is not in that of lse",
        "flashattn/reference/derivatives.py",
        "tangent_lse + torch.exp(sinks - lse - rest) * moved)",
        "tangent_lse)",
        (ATTENTION + "[sinks-torch.float32-reference]",),
    ),
    Mutant(
        "the second derivative forgets the tangent of v",
        "flashattn/reference/derivatives.py",
        "p * (tangent_dp - tangent_delta)",
        "p * (-tangent_delta)",
        (ATTENTION + "[full-torch.float32-reference]",),
    ),
    Mutant(
        "the gradient of a bias is that before the score_mod",
        "flashattn/reference/scores.py",
        "        of_bias = gradient if vjp_of_mod is None else vjp_of_mod(gradient, totals)\n",
        "        of_bias = gradient\n",
        ("tests/derivatives/test_mods.py::test_against_float64[bias-score_mod-reference]",),
    ),
    Mutant(
        "pairs that are hidden are asked for their derivatives",
        "flashattn/reference/derivatives.py",
        "everywhere = mod is None or not mod.captured or attends.all()",
        "everywhere = True",
        ("tests/derivatives/test_mods.py::test_pairs_that_are_hidden_are_not_asked",),
    ),
    Mutant(
        "the engine's softcap has no second derivative",
        "csrc/score_mods.h",
        "store(softcap.second + row * stride + i, t * (1 - t * t) * (-2 * inverse));",
        "store(softcap.second + row * stride + i, vf{});",
        (ATTENTION + "[softcap-torch.float32-cpu]",),
    ),
    Mutant(
        "the engine's tangent of the output keeps its mean",
        "csrc/jvp.cpp",
        "store(at, load<vf>(at) - load<vf>(x.mu + i) * load<vf>(t.out_t + c * t.lanes + i));",
        "store(at, load<vf>(at));",
        (ATTENTION + "[long-torch.float32-cpu]",),  # of one tile of keys, c is the mean already
    ),
    Mutant(
        "a mapped call shares the gradient of its bias",
        "flashattn/ops/folding.py",
        "name in whole)",
        "False)",
        (TRANSFORMS + "test_vmap_is_a_loop[shared_bias-gradients-reference]",),
    ),
    Mutant(
        "calls that drop weights are mapped as one",
        "flashattn/ops/folding.py",
        "return dropout_p > 0 or any(",
        "return any(",
        (TRANSFORMS + "test_vmap_is_a_loop[dropout-values-reference]",),
    ),
    Mutant(
        "levels below a differentiated one have no gradients",
        "flashattn/ops/register.py",
        "with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():",
        "with torch._C._AutoDispatchBelowAutograd():",
        (TRANSFORMS + "test_transforms",),
    ),
    Mutant(
        "a tangent at the level of the gradients is a constant",
        "flashattn/ops/register.py",
        "                tangents = ctx.call.rules.jvp(*moved)[1]\n",
        "                pass\n",
        (CALLS + "test_second_derivatives[q]", CALLS + "test_a_tangent_can_be_differentiated"),
    ),
    Mutant(
        "a third derivative of attention is 0",
        "flashattn/ops/attention_derivatives.py",
        "        refuse_third_derivative()\n",
        "        pass\n",
        (CALLS + "test_a_third_derivative[q]",),
    ),
    Mutant(
        "a transform's numbers are traced as constants",
        "flashattn/score_mod.py",
        "run = run_in_clean_thread if transformed else",
        "run = run_in_clean_thread if False else",
        (TRANSFORMS + "test_callables_first_seen_by_a_transform",),
    ),
]
