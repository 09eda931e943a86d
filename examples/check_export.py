"""Do transformers and ossature compute the same with an exported model?

    python examples/check_export.py RUN EXPORT

The run's weights, rounded to bfloat16 as in the export, go through our model; the exported folder
goes through transformers; both compute in float32.  Exit status 1 if any logit differs by more
than 1e-4.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import ossature

TOLERANCE = 1e-4


def main(run: str, export: str) -> int:
    logging.disable_progress_bar()
    ours = ossature.load_model(run, dtype=torch.bfloat16).float()
    theirs = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(ours.config.vocab_size, (2, 200), generator=generator)
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max().item()
        written = ossature.generate(ours, tokens[:, :20], max_new_tokens=20)
        expected = theirs.generate(
            tokens[:, :20], max_new_tokens=20, do_sample=False, eos_token_id=None
        )
    same = torch.equal(written, expected)
    print(f"{Path(export)}: transformers loads it as {type(theirs).__name__}")
    print(f"max |logit difference| {difference:.2e} in fp32 over {tokens.numel()} tokens")
    print(f"greedy text of 2 x 20 tokens: {'the same' if same else 'DIFFERENT'}")
    return 0 if difference <= TOLERANCE and same else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: check_export.py RUN EXPORT")
    sys.exit(main(*sys.argv[1:]))
