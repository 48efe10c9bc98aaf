"""What was found wrong in other libraries, and the test that shows it is not so here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

DEFECTS = {
    "backtracking-llm": {
        "after the first token is rejected, the model sees the prompt twice": "operators.test_the_first_token_can_be_"
        "rejected_and_the_model_sees_the_prompt_once",
        "text and cache differ after a rollback": "operators.test_the_model_is_asked_for_the_text_as_it_stands",
        "no ban and no budget: an operator that always fires never ends": "operators.test_an_operator_that_always_"
        "objects_comes_to_an_end",
        "an operator that judges places fires at the same place for ever": "operators.test_an_operator_that_judges_"
        "places_leaves_them",
        "temperature 0 samples; top-k 1 raises": "operators.test_greedy_with_an_operator_takes_the_best_it_accepts",
        "NGramOverlap forgets all it has seen": "operators.test_ngrams_are_remembered_across_a_rollback",
        "what operators saw leaks into the next text": "operators.test_generations_share_no_state_and_run_together",
        "ProbabilityDrop accepts anything after its own rejection": "operators.test_drop_compares_with_the_last_token_"
        "that_stayed",
        "asked at every n-th token, operators skip the others": "operators.test_asked_at_every_nth_token_an_operator_"
        "has_followed_the_others",
        "all parts of characters are one token to operators": "operators.test_parts_of_characters_are_told_apart_by_"
        "their_bytes",
        "a stop string inside a token is missed, and stays in the text": "operators.test_a_stop_string_that_ends_"
        "inside_a_token_is_cut_off",
        "chat doubles the beginning-of-text token": "operators.test_a_turn_leaves_the_history_alone_and_has_one_bos",
        "a rollback computes again what was known": "walk.test_every_prefix_is_asked_once_and_counted",
        "documented are raw logits, told are scaled ones": "operators.test_an_operator_sees_scaled_logits_"
        "probabilities_rank_and_text",
    },
    "backtrack_sampler": {
        "Go back streams the wrong text": "strategies.test_a_person_goes_back_and_the_stream_is_what_stays",
        "an end token cannot be taken back": "strategies.test_slop_that_ends_with_the_text_is_taken_back_with_its_end",
        "Replace with max_prob never ends": "strategies.test_a_phrase_too_probable_to_be_replaced_stays",
        "replacements are miscounted": "strategies.test_a_replacement_is_not_searched_again_and_is_counted_"
        "per_replacement",
        "bans belong to positions": "strategies.test_bans_belong_to_prefixes_not_to_positions",
        "inner capitals and other segmentations are missed": "phrases.test_a_phrase_is_found_across_tokens",
        "a phrase may begin in the prompt": "phrases.test_a_phrase_that_begins_in_the_prompt_is_found",
        "a phrase of a kept head and a new tail is not searched": "phrases.test_a_phrase_of_a_kept_head_and_a_new_tail_"
        "is_found",
        "a chain of users' strategies asks all of them": "strategies.test_of_several_strategies_of_users_that_fire_"
        "only_the_first_in_the_list_acts",
        "the scan is quadratic in the text, for each phrase": "smollm2.test_a_thousand_phrases_cost_little_per_token",
        "in a chain, the tail of a replacement goes on without its head": "strategies.test_in_a_chain_the_first_that_"
        "objects_acts_and_pending_text_is_dropped",
        "of two forced tokens one is drawn by lot": "strategies.test_of_two_that_object_to_one_token_the_first_in_"
        "the_list_counts",
        "stopping early leaves a stale cache": "strategies.test_reading_early_to_a_stop_leaves_nothing_behind",
        "a person's choice is only made likely": "strategies.test_a_person_is_not_asked_about_what_is_certain_and_a_"
        "choice_is_the_choice",
        "nothing imports without curses": "strategies.test_without_curses_only_the_menu_is_missing",
        "one text at a time": "strategies.test_a_strategy_of_a_users_runs_alone_and_64_at_once",
    },
    "antislop-sampler and servers with banned strings": {
        "the replacement is drawn at another temperature": "modes.test_temperature_and_top_k_condition_the_filtered_"
        "model",
        "phrases are found within words": "strategies.test_a_word_inside_another_is_left_alone",
        "a phrase with capitals is looked up in lower case, and not found": "phrases.test_a_phrase_with_capitals_is_"
        "found_in_any_case_as_a_whole",
        "penalties compound with every look at the same match": "modes.test_a_penalty_in_mode_exact_scales_each_match_"
        "once",
        "streamed tokens are not those that were drawn": "walk.test_what_is_final_never_changes",
        "expressions cannot stream": "phrases.test_expressions_hold_back_a_partial_match_and_refuse_the_empty_one",
        "the first phrase of the list wins, not the earliest": "phrases.test_the_ban_that_reaches_furthest_back_counts_"
        "and_penalties_come_after_bans",
        "a ban hides a stop": "walk.test_of_a_ban_and_a_stop_in_one_token_the_first_in_the_text_counts",
        "the first token is banned with all that is innocent": "phrases.test_mode_first_also_removes_what_is_innocent",
        "tokens taken back count against the length": "operators.test_an_end_token_can_be_taken_back",
    },
    "speculative-grammar-backtracking": {
        "text outside the grammar is returned": "guide.test_what_is_outside_the_grammar_is_never_said_to_be_in_it",
        "unfinished text costs a correction": "guide.test_unfinished_text_costs_no_correction",
        "text cut inside a terminal is judged wrong": "parser.test_unfinished_text_is_alive",
        "where more than one token is healed, too much is dropped": "guide.test_several_tokens_are_healed_at_one_seam",
        "greedy choices of a second model, from no stated distribution": "grammar_rule.test_exact_walks_draw_from_the_"
        "model_given_the_grammar",
        "a grammar of the empty text crashes": "guide.test_a_grammar_of_nothing_too_has_a_text",
        "a path is read as a grammar": "parser.test_grammars_come_from_text_paths_and_names",
    },
}


@pytest.mark.parametrize("library", DEFECTS)
def test_each_defect_has_its_test(library: str) -> None:
    for test in DEFECTS[library].values():
        file, name = test.split(".")
        source = (Path(__file__).parent / f"test_{file}.py").read_text(encoding="utf-8")
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert name in {node.name for node in ast.parse(source).body if isinstance(node, functions)}, test
