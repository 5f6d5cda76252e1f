"""Help for adapters that build a tiny real model: a tokenizer learnt from the cast's own text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VOCABULARY = 4096
"""Most tokens learnt. A cast's text has a few hundred words; each becomes one token long before this is reached."""


@contextmanager
def byte_level_bpe(texts: Sequence[str]) -> Iterator[Path]:
    """A folder with the `vocab.json` and `merges.txt` of a byte-level BPE learnt from `texts`.

    Any text can be encoded with it; words that occur in `texts` are single tokens. The folder is removed afterwards.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(list(dict.fromkeys(texts)), trainer)
    with tempfile.TemporaryDirectory(prefix="vkd-tokenizer-") as name:
        folder = Path(name)
        learned = json.loads(learner.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(learned["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        yield folder
