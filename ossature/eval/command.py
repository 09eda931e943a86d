"""`ossature eval FOLDER --tasks ...` and `ossature eval --compare A B`."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import fields

from ossature.config import parse
from ossature.eval import results
from ossature.eval.options import CompareOptions, EvalOptions, TaskOptions


def main(argv: list[str]) -> int:
    if any(word.partition("=")[0] == "--compare" for word in argv):
        return compare(parse(CompareOptions, argv, prog="ossature eval"))
    options = parse(EvalOptions, argv, prog="ossature eval")
    if not options.tasks:
        raise ValueError("eval: no task; give --tasks NAME ...")

    import torch

    from ossature.convert.folder import resolve
    from ossature.data.tokenizer import load as load_tokenizer
    from ossature.eval import tasks
    from ossature.eval.needle import plot
    from ossature.eval.subject import open_subject
    from ossature.parallel.launch import first_prints, launched

    folder = resolve(options.folder)
    if not options.tokenizer and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json beside the weights; say which one with --tokenizer"
        )
    for path in (options.output, options.plot):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: no such folder: {path.parent}")
        if path is not None and path.is_dir():
            raise ValueError(f"{path}: is a folder; give a file")
    if options.plot is not None and not _needles(options.tasks):
        raise ValueError(f"plot ({options.plot}) needs the task needle")
    tasks.check(options.tasks, options)
    tokenizer = load_tokenizer(options.tokenizer or str(folder))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    with launched() as ranks, first_prints(ranks):
        subject = open_subject(folder, options, tokenizer, dtype, ranks)
        with closing(subject.answers):
            found = tasks.run(subject, options.tasks, options)
        if ranks.first:
            settings = {f.name: getattr(options, f.name) for f in fields(TaskOptions)}
            settings |= {"dtype": options.dtype, "adapter": str(options.adapter or "")}
            made = results.to_json(str(folder), settings, found)
            # Files first: who reads the table may go away (`| head`).
            if options.output is not None:
                results.write(options.output, made)
            if options.plot is not None:
                plot(found[_needles(options.tasks)[0]], options.plot)
            for line in results.table(made):
                print(line)
            if options.output is not None:
                print(f"wrote {options.output}", file=sys.stderr)
    return 0


def _needles(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.partition(":")[0] == "needle"]


def compare(options: CompareOptions) -> int:
    if len(options.compare) != 2:
        raise ValueError(f"compare: give two files of results, not {len(options.compare)}")
    a, b = options.compare
    for line in results.compare(a, b):
        print(line)
    return 0
