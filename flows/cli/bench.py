"""`dpo bench`: measure training speed and memory against TRL's."""

from flows.cli.options import JsonOption, SetOption


def bench(overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Measure training speed and memory against TRL's: same model, pairs, tokens and optimiser, alternating.

    Fields: workload (hh, long-prompt, long-answer, 4k), data and model (for hh), size (tiny, 135m, 360m,
    1.7b), pairs, batch_size, rounds, threads, seed; ours.precision, ours.pack_tokens, ours.compile;
    trl.precision, trl.micro_batch_size, or trl=null for ours alone.
    """
    from flows.commands.bench import run_bench

    run_bench(overrides or [], as_json)
