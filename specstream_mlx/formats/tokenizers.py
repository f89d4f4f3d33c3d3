"""The tokenizer of a model's directory, through mlx-lm; damaged files are refused by name."""

import json
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.load_errors import load_error

_SPACE = "Ġ"  # a space in the alphabet of byte-level vocabularies


def open_tokenizer(path: Path, extra: dict[str, Any], eos_token_ids: Any = None) -> TokenizerWrapper:
    """mlx-lm's wrapper of the tokenizer in a directory.

    Args:
        path: the directory.
        extra: further arguments of transformers' tokenizer.
        eos_token_ids: of the model's configuration.

    Raises:
        InvalidInputError: a file is missing or damaged, or of a kind that no library here reads.
        UnsupportedError: the tokenizer needs code that comes with the checkpoint.
    """
    try:
        tokenizer = load_tokenizer(path, extra, eos_token_ids=eos_token_ids)
    except Exception as error:  # the libraries raise many kinds, a bare Exception among them
        found = load_error(path, error, "tokenizer files")
        if isinstance(found, UnsupportedError):
            raise found from error
        if not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists() and not _has_sentencepiece():
            raise InvalidInputError(
                f"{path / 'tokenizer.model'}: read by the package sentencepiece, which is missing; install it"
            ) from error
        raise load_error(_damaged(path), error, "tokenizer") from error
    _read_bytes(tokenizer)
    return tokenizer


def _damaged(path: Path) -> Path:
    """The file to blame: the first that cannot be read on its own, or the directory."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if not _is_json(path / name):
            return path / name
    file = path / "tokenizer.json"
    if not file.exists():
        return path / "tokenizer.model" if (path / "tokenizer.model").exists() else file
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception:  # what the library raises is a bare Exception
        return file
    return path / "tokenizer_config.json" if (path / "tokenizer_config.json").exists() else path


def _has_sentencepiece() -> bool:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        return False
    return True


def _is_json(file: Path) -> bool:
    try:
        return not file.exists() or isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _read_bytes(tokenizer: TokenizerWrapper) -> None:
    """Decode a byte-level vocabulary as one, whatever decoder the files name.

    With no decoder, or another one, every space of a text would be shown as ``Ġ``.
    """
    backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" in repr(backend.decoder):
        return
    added = {token.content for token in tokenizer._tokenizer.added_tokens_decoder.values()}
    words = [word for word in tokenizer.get_vocab() if word not in added]
    if not any(word.startswith(_SPACE) for word in words) or not all(set(word) <= _ALPHABET for word in words):
        return
    from tokenizers import decoders

    backend.decoder = decoders.ByteLevel()
    tokenizer._detokenizer = BPEStreamingDetokenizer(tokenizer._tokenizer)


def _alphabet() -> frozenset[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies, as GPT-2 introduced them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return frozenset(map(chr, [*shown, *range(256, 256 + 256 - len(shown))]))


_ALPHABET = _alphabet()
