"""Sentencepiece tokenizers as native fast tokenizers with the very ids of sentencepiece: ChatGLM3's and Llama's.

ChatGLM3's original is sentencepiece BPE with nine special tokens numbered after its vocabulary. Text can never become
one of them: users type `<|user|>` and get ordinary pieces. There is one exception, which the models were trained with:
the original looks ids up by spelling, special tokens first, so a piece spelled `sop` or `eop` has the id of the special
token (also in decoding, which skips it with the special tokens), and the piece's own id is never used.

Llama's come in two kinds, told apart by where sentencepiece's dummy prefix goes, a space before the text. With `legacy`
it goes before every piece of text between special tokens, as sentencepiece itself does; without, only before the very
beginning of a text. Llama-2's tokenizer_config.json says `"legacy": false`, and so LongAlign trained with it. Where the
key is absent transformers 4 took true; 5 takes false and so do we. Write the key there to choose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from longalign.errors import UserError
from longalign.files import read_json

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
WITH_PREFIX = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES]  # ids follow the sentencepiece vocabulary


def chatglm_tokenizer(tokenizer_model: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of ChatGLM3 from its sentencepiece file: tokenizer(text) is `[gMASK] sop` and the text's ids.

    EOS is `</s>`, padding `<unk>`, there is no BOS. Saved with save_pretrained, it loads in AutoTokenizer with the same
    ids. Raises UserError for a file that is not such a model.
    """
    proto = read_sentencepiece(tokenizer_model)
    kind = proto.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    # a whole control or byte piece, say `</s>` or `<0x0A>`, is never made of characters of a text
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    merges = generate_merges({piece: ids[piece] for piece in scores}, scores)

    special = {token: len(ids) + i for i, token in enumerate(SPECIAL)}
    shadowed = {f"<piece:{token}>": token for token in special if token in ids}
    vocab = {**ids, **special, **{name: ids[token] for name, token in shadowed.items()}}
    unk = proto.trainer_spec.unk_piece
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = WITH_PREFIX
    tokenizer.decoder = decoders.Sequence(
        [
            *[decoders.Replace(name, token) for name, token in shadowed.items()],
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (kind.UNKNOWN, kind.CONTROL)]
    # A whole word where special tokens are read at all (split_special_tokens=False), or `sophist` would hold one.
    added = [
        AddedToken(token, special=True, normalized=False, single_word=token.isalpha()) for token in [*control, *special]
    ]
    tokenizer.add_special_tokens(added)
    prefix = [(token, special[token]) for token in ("[gMASK]", "sop")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A", pair="[gMASK] sop $A $B:1", special_tokens=prefix
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        pad_token=unk,
        eos_token=proto.trainer_spec.eos_piece,
        extra_special_tokens=[t for t in added if t.content not in (unk, proto.trainer_spec.eos_piece)],
        split_special_tokens=True,  # or `<|user|>` typed by a user would be the special token
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def exact_llama(tokenizer: LlamaTokenizer) -> PreTrainedTokenizerFast:
    """transformers' LlamaTokenizer with the ids of sentencepiece also where a text begins with spaces.

    transformers 5 builds it anew from vocabulary, merges and `legacy`, even where there is a tokenizer.json, and puts
    no dummy prefix before a space: " a" becomes the pieces of "a". What is returned keeps all else and, saved with
    save_pretrained, loads as it is.
    """
    if tokenizer.init_kwargs.get("add_bos_token") is None:
        tokenizer.add_bos_token = True  # type: ignore[misc]  # as in transformers 4, and in Llama-2's training
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if tokenizer.legacy:
        backend.normalizer, backend.pre_tokenizer = WITH_PREFIX, None
    else:
        # Metaspace adds its mark only to the piece at offset 0, but not before a mark: so it adds a space, of which
        # none is left by then, and a second one turns that into the mark.
        first = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
        mark = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, mark])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        model_input_names=tokenizer.model_input_names,
    )


def is_bare_llama(folder: Path) -> bool:
    """Whether `folder` has Llama's `tokenizer.model` but does not name its class.

    AutoTokenizer would then make a tokenizer of another kind of it, whose ids are neither of Llama's.
    """
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return False
    told: dict[str, str] = {}
    for name in ("config.json", "tokenizer_config.json"):
        told |= read_json(folder / name) if (folder / name).is_file() else {}
    return "tokenizer_class" not in told and told.get("model_type", "llama") == "llama"


def read_sentencepiece(path: Path) -> Any:
    """The sentencepiece model, as protobuf, if of the kind whose segmentation we reproduce; else raises UserError."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, ValueError, DecodeError) as error:
        raise UserError(f"{path} is no sentencepiece model: {error}") from None
    trainer, normalizer, kind = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    same = {
        "BPE": trainer.model_type == trainer.BPE,
        "byte fallback": trainer.byte_fallback,
        "no normalisation": not normalizer.precompiled_charsmap,
        "a dummy prefix": normalizer.add_dummy_prefix and not trainer.treat_whitespace_as_suffix,
        "kept whitespace": normalizer.escape_whitespaces and not normalizer.remove_extra_whitespaces,
        "no user-defined pieces": all(piece.type != kind.USER_DEFINED for piece in proto.pieces),
    }
    if missing := [name for name, holds in same.items() if not holds]:
        raise UserError(f"{path} is not ChatGLM3's kind of sentencepiece model, which has {', '.join(missing)}")
    return proto
