"""Jinja forms of the built-in templates, written into exported tokenizers for other programs.

All render the text that the model was trained on. Tokenised, the two of ChatGLM give the ids of Template too, but for
two things that come of encoding one joined text where Template encodes segment by segment:

- a special token spelled out by a user or in an answer is taken for one (our own chat and eval take it for text),
- an answer that ends with spaces, under longalign-chatglm: its last space joins the one that follows.

Llama's may also merge the characters on both sides of a segment's edge.
"""

from __future__ import annotations

LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '[INST]' + (system if loop.first else '') + m['content'] + '[/INST]' }}{% else %}{{ m['content'] }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
)

# The spaces before an answer and before a later round are the dummy prefixes that these segments are encoded with.
CHATGLM = (
    "[gMASK]sop{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ ('' if loop.first else ' \\n\\n') + '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' }}"
    "{{ (system if loop.first else '') + m['content'] + '\\n\\n答：' }}"
    "{% elif m['content'] %}{{ ' ' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
)

# As above; the dummy prefix of the line break is added by the tokenizer, as after every special token.
CHATGLM3 = (
    "[gMASK]sop{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}"
    "{% if m['content'] %}{{ ' ' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

EXPORTED = {"longalign-llama": LLAMA, "longalign-chatglm": CHATGLM, "chatglm3": CHATGLM3}
