"""What `make quick` runs: all tests but the slow ones named here, and a few of those. Its time is under two minutes on
two cores with cold caches; a test that takes over some two seconds belongs in SLOW."""

from __future__ import annotations

# Whole modules, and functions of others.
SLOW = {
    "attention/test_attention.py": ("test_random_cases", "test_memory_is_linear"),
    "attention/test_decode.py": ("test_long_caches",),
    "attention/test_float32_precision.py": ("test_attention", "test_features", "test_decoding", "test_loops_"),
    "attention/test_varlen.py": ("test_random_cases", "test_memory_follows_the_tokens"),
    "backends/test_backends.py": ("test_instruction_sets", "test_environment_variable"),
    "bench/test_gpu.py": (),
    "bench/test_tune.py": (),
    "compat/test_flex.py": ("test_memory_is_linear",),
    "compat/test_sdpa.py": ("test_provider_is_activated_only_when_asked",),
    "derivatives/test_examples.py": (),
    "derivatives/test_mods.py": ("test_triton",),
    "derivatives/test_opinfo.py": (),
    "derivatives/test_transforms.py": ("test_transforms_in_a_graph",),
    "kernels/test_compiled.py": (),
    "kernels/test_derivatives.py": (),
    "kernels/test_machine_code.py": (),
    "kernels/test_norm_bytes.py": (),
    "kernels/test_on_ptx.py": (),
    "kernels/test_opcodes.py": ("test_opcodes_are_those_recorded",),
    "kernels/test_roles.py": (),
    "kernels/test_shared_memory.py": ("test_every_call_fits",),
    "model/test_checkpoints.py": ("test_smollm2_continues_as_in_transformers", "test_truncated_gguf"),
    "model/test_parallel.py": (),
    "model/test_saving.py": ("test_a_gguf_becomes_a_directory",),
    "model/test_serving.py": ("test_guesses_change_nothing", "test_real_weights"),
    "model/test_tasks.py": (),
    "model/test_train.py": ("test_killed_at_any_moment",),
    "operators/test_fullgraph.py": (
        "test_another_callable_is_another_graph", "test_autocast", "test_block_mask_alone", "test_inductor",
        "test_nested_tensors", "test_return_aux", "test_score_mod_and_block_mask", "test_sizes_that_are_symbols",
        "test_what_can_be_a_callable",
    ),
    "operators/test_fullgraph_decode.py": (),
    "operators/test_opinfo.py": ("test_values_and_gradients",),
    "operators/test_ops.py": ("test_compile_",),
    "package/test_command_line.py": (),
    "package/test_install.py": (),
    "package/test_quick.py": ("test_samples_are_collected",),
    "package/test_types.py": (),
    "ptx/test_counts.py": ("test_decoding_moves_the_cache_once",),
    "ptx/test_kernels.py": ("test_cast", "test_matmul", "test_scan_sort_argmax"),
    "ptx/test_rings.py": (),
}  # fmt: skip
# Of these: each kernel compiled and executed once, a graph, rings with faults.
SAMPLES = (
    "kernels/test_compiled.py::test_attention[sm_80-64]",
    "kernels/test_compiled.py::test_attention[gfx942-64]",
    "kernels/test_compiled.py::test_decoding[sm_90-plain-torch.bfloat16-True]",
    "kernels/test_compiled.py::test_norms[sm_80-64]",
    "kernels/test_on_ptx.py::test_attention_shapes[sm_89-wider_v-torch.bfloat16]",
    "kernels/test_on_ptx.py::test_attention_shapes[sm_90-head_dim_64-torch.bfloat16]",
    "kernels/test_on_ptx.py::test_decoding[sm_90-rotary_partial-torch.bfloat16]",
    "kernels/test_on_ptx.py::test_norms[sm_80-layer-torch.bfloat16]",
    "operators/test_fullgraph_decode.py::test_opcheck[cpu]",
    "ptx/test_rings.py::test_faults",
)


def is_quick(node: str) -> bool:
    """Of a test's id, or of a module's doctest."""
    file, _, name = node.removeprefix("tests/").partition("::")
    slow = file in SLOW and (not SLOW[file] or name.startswith(SLOW[file]))
    return not slow or node.removeprefix("tests/").startswith(SAMPLES)
