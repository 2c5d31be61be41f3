"""Tests that `make quick` leaves out, beside those marked `slow` where they stand.

All that stays takes less than 90 seconds on two cores, and compares values of every folder with an
oracle. Times are those of a CPU core.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# minutes each: trainings, compilers, several processes, libraries that are long to import
FILES = (
    "benchmarks/test_benchmarks.py",
    "heads/test_sharded.py",
    "integrations/test_axolotl.py",
    "integrations/test_liger.py",
    "integrations/test_llamafactory.py",
    "integrations/test_nemo_rl.py",
    "integrations/test_openrlhf.py",
    "integrations/test_swift.py",
    "integrations/test_trl.py",
    "integrations/test_trl_online_sharing.py",
    "integrations/test_trl_own.py",
    "integrations/test_trl_sharing.py",
    "integrations/test_verl.py",
    "ops/test_cold.py",
    "ops/test_compile.py",
    "ops/test_vocab_parallel.py",
    "test_examples.py",
    "viz/test_browser.py",
)

# cases in Triton's interpreter, a second each and many; ops/test_tiles.py and kernels/ keep some
INTERPRETED = (
    "losses/test_objective.py",
    "ops/test_filtered.py",
    "ops/test_fused.py",
    "ops/test_linear_kl.py",
    "ops/test_linear_logprobs.py",
)

# single tests of more than a second, or many cases of a kind; name[part]: cases with part in their
# id
FUNCTIONS = {
    "cli/test_adapters.py": ("test_train_with_samples_and_a_merged_model",),
    "cli/test_cli.py": (
        "test_a_finished_run_is_left_alone",
        "test_adapters_are_no_start",
        "test_an_objective_of_ones_own_trains_on_a_source_of_ones_own",
        "test_another_reference",
        "test_bfpo_from_raw_rows",
        "test_from_a_file_to_a_page",
        "test_killed_training_goes_on",
        "test_limit_is_for_raw_rows",
        "test_lora",
        "test_methods_from_raw_rows",
        "test_mixed_precision_sees_the_same_reference",
        "test_plain_objective_needs_no_annotation",
        "test_plain_objective_reads_the_rows_that_were_asked_for",
        "test_rewards_of_ones_own_source_train_dpo",
        "test_the_three_commands",
        "test_two_runs_in_one_folder",
        "test_weights_of_ones_own_source_train_simpo",
    ),
    "cli/test_evaluate_credit.py": (
        "test_a_page",
        "test_an_annotated_file_is_joined",
    ),
    "cli/test_runs.py": (
        "test_a_checkpoint_of_the_model_alone_is_no_start",
        "test_a_checkpoint_without_a_seal_is_tested_by_its_formats",
        "test_a_disk_that_is_full",
        "test_a_finished_run_without_checkpoints_is_kept",
        "test_a_run_that_diverges_ends_with_an_error",
        "test_data_and_models_are_known_by_their_content",
        "test_the_run_goes_on_from_the_older_one",
        "test_the_same_of_epochs_that_are_not_whole",
    ),
    "cli/test_several.py": (
        "test_a_file_of_another_model_is_named",
        "test_files_are_refused_before_others_are_annotated",
        "test_files_that_do_not_go_together_are_named",
        "test_one_file_of_weight_1_is_that_file",
        "test_raw_files_are_annotated_each",
        "test_raw_files_beside_annotated_ones",
        "test_raw_files_beside_one_of_another_day",
        "test_raw_files_of_a_plain_objective",
    ),
    "data/test_data.py": (
        "test_any_text",
        "test_real_files",
        "test_real_templates",
        "test_truncated_gzip",
    ),
    "data/test_identity.py": (
        "test_a_card_that_the_hub_reads",
        "test_files_that_were_not_annotated_alike",
        "test_filtered_and_shuffled",
        "test_no_bit_of_a_file_changes_unseen",
    ),
    "data/test_row_cache.py": ("test_several_processes_are_one",),
    "demo/test_demo.py": ("test_demo",),
    "evaluate/test_told.py": ("test_pictures",),
    "heads/test_heads.py": ("test_every_causal_lm", "test_without_a_row_the_check_refuses"),
    "integrations/test_cce.py": ("test_dtensor_equals_dense", "test_vocab_parallel_equals_dense"),
    "losses/test_losses.py": ("test_gradcheck", "test_pair_scalar"),
    "losses/test_methods.py": (
        "test_the_operator_is_registered_right_with_every_slope",
        "test_the_same_in_a_graph",
    ),
    "losses/test_objective.py": (
        "test_operator_is_registered_right",
        "test_operator_under_compile",
    ),
    "losses/test_treg_loss.py": (
        "test_a_first_call_on_a_cpu_imports_no_compiler",
        "test_a_schedule_needs_no_more_graphs",
        "test_bad_numbers_are_refused_inside_a_graph",
    ),
    "ops/test_bad_input.py": ("test_triton_on_cpu_tensors_without_its_interpreter",),
    "ops/test_entropy.py": (
        "test_compiled_with_a_temperature_that_changes",
        "test_the_operators_schemas",
    ),
    "ops/test_filtered.py": (
        "test_both_implementations_agree",
        "test_epsilon_of_zero_keeps_everything",
        "test_slabs_of_rows_add_up_in_float32",
    ),
    "ops/test_fused.py": (
        "test_any_call",
        "test_every_way",
        "test_matrix_products",
        "test_memory_in_the_interpreter",
        "test_memory_stays_within_the_budget",
    ),
    "ops/test_gemm.py": (
        "test_float16_is_widened_slab_by_slab",
        "test_scaled_to_makes_no_wide_copy",
    ),
    "ops/test_linear_kl.py": (
        "test_a_schedule_of_the_temperature_needs_no_third_graph",
        "test_bad_numbers_are_refused_when_the_graph_runs",
        "test_compiled_in_one_graph",
        "test_matrix_products",
        "test_memory_stays_within_the_budget",
        "test_other_lengths_need_no_third_graph",
    ),
    "ops/test_linear_logprobs.py": (
        "test_any_shape_option_and_budget",
        "test_least_memory_has_no_float32_sum_of_dweight",
        "test_memory_stays_within_the_budget",
    ),
    "ops/test_tiles.py": ("test_every_tile",),
    "rewards/test_annotate.py": (
        "test_a_killed_run_goes_on",
        "test_a_run_that_is_killed_while_it_cleans_up",
        "test_batching_changes_nothing",
        "test_left_over_parts_of_a_complete_output_are_removed",
        "test_real_files",
        "test_smaller_batches_go_on",
        "test_two_processes",
        "test_values[plain-]",
        "test_what_was_made_otherwise_is_refused",
    ),
    "rewards/test_implicit.py": (
        "test_a_files_fingerprint_is_that_of_the_model_without_its_source",
        "test_an_adapter_knows_its_base",
        "test_an_adapter_on_the_runs_model[-True]",
        "test_identities",
        "test_one_copy_of_the_weights_serves_all",
        "test_refused",
        "test_two_models[1.0]",
    ),
    "rewards/test_redistribution.py": (
        "test_batching_changes_roundings_only",
        "test_blanks_around_an_answer",
        "test_every_token_gets_what_its_beginning_adds[gemma2]",
        "test_every_token_gets_what_its_beginning_adds[gpt2]",
        "test_every_token_gets_what_its_beginning_adds[qwen2]",
        "test_labels",
        "test_models_that_look_ahead",
        "test_padding",
        "test_refused",
        "test_steps",
    ),
    "rewards/test_parts.py": ("test_a_part_that_cannot_be_trusted_is_computed_again",),
    "test_package.py": (
        "test_import_loads_nothing_heavy_and_reads_no_environment",
        "test_kernels_package_would_break_transformers",
        "test_transformers_imports_beside_our_kernels_folder",
        "test_wheel_holds_the_library_and_nothing_else",
    ),
    "trainer/test_methods.py": (
        "test_gradient_is_that_of_dense_logits[-adapters-]",
        "test_kl_of_heads_with_options",
    ),
    "trainer/test_sharing.py": (
        "test_resumed_is_uninterrupted",
        "test_two_processes_in_shared_rows_are_one_apart",
        "test_what_one_of_two_processes_finds_counts_for_both",
    ),
    "trainer/test_trainer.py": (
        "test_gradient_is_that_of_dense_logits[-True-]",
        "test_gradient_is_that_of_dense_logits[gemma2]",
        "test_gradient_is_that_of_dense_logits[packed]",
        "test_gradient_is_that_of_dense_logits[tied]",
        "test_gradient_of_other_adapters",
        "test_checkpointed_activations_leave_the_gradient",
        "test_gradient_with_token_weights",
        "test_killed_and_resumed_is_uninterrupted",
        "test_one_by_eight_is_eight_by_one",
        "test_resumed_is_uninterrupted",
        "test_tokens_are_counted_across_a_resume_between_log_lines",
        "test_two_processes_are_one",
    ),
    "viz/test_viz.py": (
        "test_a_panel_for_each_quantity",
        "test_embedded",
        "test_nothing_to_draw",
        "test_pieces_join_to_the_decoded_text",
        "test_text_cut_anywhere",
    ),
}


def is_slow_file(path: Path) -> bool:
    return path.is_relative_to(TESTS) and path.relative_to(TESTS).as_posix() in FILES


def is_slow(item: pytest.Item) -> bool:
    path = item.path.relative_to(TESTS).as_posix()
    function, _, case = item.name.partition("[")
    for row in FUNCTIONS.get(path, ()):
        name, _, part = row.rstrip("]").partition("[")
        if name == function and part in case:
            return True
    if path in INTERPRETED and item.get_closest_marker("interp") is not None:
        return True
    return is_slow_file(item.path)


def idle_rows() -> list[str]:
    """Rows above that name no file, or no test of it."""
    idle = [path for path in (*FILES, *INTERPRETED) if not (TESTS / path).is_file()]
    for path, functions in FUNCTIONS.items():
        defined = set()
        if (TESTS / path).is_file():
            tree = ast.parse((TESTS / path).read_text())
            defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for row in functions:
            if row.partition("[")[0] not in defined:
                idle.append(f"{path}::{row}")
    return idle
