"""The tests that run on an emulated GPU with a fault in it."""

from __future__ import annotations

# Tests are in the order in which they run, those first that see most for their time.
OP = (
    "test_op_oracle.py::test_any_layout",
    "test_op_oracle.py::test_ugly_sizes[2-dtype1]",
    "test_kernel_details.py::test_fewer_blocks_than_work",
    "test_kernel_details.py::test_a_block_turns_its_queries_for_every_segment",
    "test_kernel_details.py::test_rotation_does_not_depend_on_how_the_query_lies",
    "test_kernel_details.py::test_windows_that_end_at_every_key_around_a_tiles_edge",
    "test_kernel_details.py::test_lse_is_of_probabilities_that_nobody_rounded",
    "test_op_oracle.py::test_a_row_that_sees_one_key_gets_its_value",
    "test_cache.py::test_attend_is_the_op_over_what_is_stored[plain-dtype1]",
    "test_op_nonfinite.py::test_nan_in_tiles_ahead",
    "test_op_nonfinite.py::test_nan_in_tiles_behind_the_window",
    "test_op_oracle.py::test_all_scores_far_from_zero",
    "test_op_bits.py::test_same_bits_however_tensors_lie_in_memory",
    "test_kernel_details.py::test_more_pages_than_are_known_ahead",
    "test_kernel_details.py::test_more_tiles_than_places_in_the_ring",
    "test_op_bits.py::test_same_bits_where_work_is_split",
    "test_op_oracle.py::test_float16_queries_and_keys_near_overflow",
    "test_op_bits.py::test_what_a_row_cannot_see_is_a_bitwise_no_op",
    "test_op_bits.py::test_same_bits_whoever_else_is_in_the_call",
    "test_kernel_details.py::test_same_bits_where_a_block_folds_several_partial_results",
    "test_op_oracle.py::test_out_given_is_filled_and_returned",
    "test_op_oracle.py::test_other_data_at_most_twice_the_eager_error",
    "test_op_nonfinite.py::test_one_bad_number_reaches_only_who_sees_it",
    "test_op_nonfinite.py::test_memory_that_held_nan_before_is_no_matter",
)
PAGES = (
    "test_cache.py::test_recycled_pages_leave_no_trace",
    "test_cache.py::test_commit_rotates_like_the_reference",
    "test_cache.py::test_half_types_store_the_rounded_rotation",
    "test_cache.py::test_attend_from_raw_keys_to_output",
    "test_cache.py::test_strided_tensors_and_out",
    "test_cache.py::test_attend_is_the_op_over_what_is_stored[plain-dtype0]",
)
