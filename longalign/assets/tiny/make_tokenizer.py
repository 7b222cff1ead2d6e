"""Builds the tokenizer of the tiny model: `python longalign/assets/tiny/make_tokenizer.py`.

The vocabulary is the 256 bytes, the words of the synthetic world and a few special tokens. Any text
can be encoded without loss.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from longalign.data import synthetic

FOLDER = Path(__file__).parent
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
MARKERS = ["[INST]", "[/INST]"]


def build() -> Tokenizer:
    """A byte-level tokenizer in which every word of the synthetic world is one token."""
    # a word takes the one space before it; paragraph breaks stand alone; anything else goes by
    # characters
    split = Regex(r" ?\p{L}+| ?[^\s\p{L}]|\n\n|\s")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), byte_level])
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    split_texts = map(pre_tokenizer.pre_tokenize_str, synthetic.vocabulary())
    words = sorted({piece for pieces in split_texts for piece, _ in pieces} - set(bytes_))
    # a word beats its bytes whatever its length, since every token costs
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(token, -10.0) for token in bytes_] + [(word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def main() -> None:
    build().save(str(FOLDER / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
