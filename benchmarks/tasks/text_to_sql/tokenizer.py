"""Trains the recipe's SentencePiece tokenizer and saves it as Hugging Face and mlx-lm read it.

The tokenizer is of Llama's kind: BPE with byte fallback, a dummy space in front of the text, `<s>` before a
prompt and `</s>` after an answer. Newlines are the byte token `<0x0A>` and digits stand alone.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from .task import Example, examples

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
KEYWORDS = (
    "CREATE",
    "TABLE",
    "INT",
    "REAL",
    "TEXT",
    "SELECT",
    "DISTINCT",
    "FROM",
    "JOIN",
    "USING",
    "WHERE",
    "AND",
    "OR",
    "NOT",
    "IN",
    "IS",
    "NULL",
    "BETWEEN",
    "LIKE",
    "GROUP",
    "BY",
    "HAVING",
    "ORDER",
    "ASC",
    "DESC",
    "LIMIT",
    "COUNT",
    "SUM",
    "AVG",
    "MIN",
    "MAX",
)


def training_lines(num_examples: int, seed: int) -> Iterator[str]:
    """The lines of training examples, as a model sees them between two newlines."""
    for example in itertools.islice(examples("train", seed), num_examples):
        yield from f"{example.prompt} {example.answer}".split("\n")


def train_sentencepiece(num_pieces: int, num_examples: int, seed: int) -> bytes:
    """Train the SentencePiece model and return it serialised."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_lines(num_examples, seed),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=num_pieces,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        # Lines after a newline have no space in front; the text as a whole gets one, see below.
        add_dummy_prefix=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model.ModelProto.FromString(buffer.getvalue())
    model.normalizer_spec.add_dummy_prefix = True
    serialized = bytes(model.SerializeToString())
    pieces = {piece.piece.lstrip("▁") for piece in model.pieces}
    if split := [word for word in KEYWORDS if word not in pieces]:
        raise ValueError(f"these keywords are no single piece, so {num_pieces} pieces are too few: {split}")
    return serialized


def to_tokenizers(serialized: bytes) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library; the merges are read off the pieces and their order."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    merges = []
    for piece, index in vocab.items():
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        for left, right in splits:
            if left in vocab and right in vocab:
                merges.append((-processor.get_score(index), vocab[left], vocab[right], left, right))
    merges.sort()
    pairs = [(left, right) for *_, left, right in merges]
    tokenizer = Tokenizer(BPE(vocab, pairs, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (UNKNOWN, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return tokenizer


def save_tokenizer(serialized: bytes, directory: Path, context_length: int) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(serialized)
    to_tokenizers(serialized).save(str(directory / "tokenizer.json"), pretty=False)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class ExampleEncoder:
    """Turns examples into token ids with the saved tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.eos_id = int(self.tokenizer.token_to_id(EOS) or 0)
        self.vocab_size: int = self.tokenizer.get_vocab_size()

    def prompt(self, example: Example) -> list[int]:
        """The ids of a prompt, `<s>` first."""
        return list(self.tokenizer.encode(example.prompt).ids)

    def whole(self, example: Example) -> tuple[list[int], int]:
        """The ids of prompt, answer and `</s>`, and how many of them are prompt."""
        ids = list(self.tokenizer.encode(f"{example.prompt} {example.answer}").ids)
        return [*ids, self.eos_id], len(self.tokenizer.encode(example.prompt).ids)

    def text(self, ids: list[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(ids))
