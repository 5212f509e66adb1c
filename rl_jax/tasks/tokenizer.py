"""The tokenizer of a name, and the SentencePiece one: any text becomes tokens and comes back exactly."""
import hashlib
import importlib.resources
import pathlib
from collections.abc import Sequence

import sentencepiece

from rl_jax import hub
from rl_jax.tasks import task
from rl_jax.tasks.checkpoint_tokenizer import CheckpointTokenizer

SPACE = "▁"


class SentencePiece:
    """Pieces of a SentencePiece model with byte fallback and identity normalisation.

    The model's own decoding is not used: it would turn a literal "▁" into a space and cannot
    join bytes into characters across pieces.
    """

    def __init__(self, model: bytes):
        """Reads a serialised model.

        Args:
          model: the bytes of a `.model` file with byte fallback, padding and end pieces.
        """
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._pieces = pieces
        self._bytes = [_text_of(pieces, i) for i in range(pieces.vocab_size())]
        self._space = [pieces.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        self.size = pieces.vocab_size()
        self.pad_id = pieces.pad_id()
        self.begin_id = pieces.bos_id()
        self.end_id = pieces.eos_id()
        self.stop_ids, self.begin_ids = (self.end_id,), ()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        if min(self.pad_id, self.end_id) < 0 or not pieces.is_byte(self._space[0]):
            raise ValueError("the SentencePiece model lacks a padding piece, an end piece or byte fallback; train it "
                             "with scripts/train_tokenizer.py.")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""
        first, *rest = self._pieces.encode(text.split(SPACE))
        return first + [i for part in rest for i in (*self._space, *part)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; begin, end and padding have none, bytes that are no text become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")


def _text_of(pieces: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    if pieces.is_byte(i):
        return bytes([int(pieces.id_to_piece(i)[1:-1], 16)])
    if pieces.is_control(i) or pieces.is_unknown(i):
        return b""
    return pieces.id_to_piece(i).replace(SPACE, " ").encode()


def load(path: str = "") -> task.Tokenizer:
    """The tokenizer shipped with the package, that of a `.model` file, or that of a published checkpoint.

    Args:
      path: "" takes the shipped one; the path of a SentencePiece `.model` file; a checkpoint's folder;
        or "owner/name" on the Hugging Face hub.

    Raises:
      ValueError: if there is nothing of that name.
    """
    if not path:
        return SentencePiece((importlib.resources.files("rl_jax.tasks") / "tokenizer.model").read_bytes())
    if not path.endswith(".model"):
        return CheckpointTokenizer(hub.folder(path))
    if not pathlib.Path(path).is_file():
        raise ValueError(f"no tokenizer at {path!r}: give the path of a SentencePiece .model file, a checkpoint's "
                         "folder, \"owner/name\" on the Hugging Face hub, or \"\" for the shipped one.")
    return SentencePiece(pathlib.Path(path).read_bytes())


def resolved(tokenizer: str | task.Tokenizer | None) -> task.Tokenizer:
    """A tokenizer as it is; a name, or None for the shipped one, as `load` has it."""
    return load(tokenizer or "") if tokenizer is None or isinstance(tokenizer, str) else tokenizer
