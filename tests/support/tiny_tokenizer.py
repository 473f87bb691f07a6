"""A tokenizer of one token a character, as the asset files that come beside weights."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unknown|>")
END = SPECIAL.index("<|im_end|>")
CHATML = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    # As reasoning models do: thoughts are cut from every reply but the last.
    "{%- set content = message.content.split('</think>')[-1] if not loop.last else message.content %}"
    "{%- else %}{%- set content = message.content %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def assets(template: str | None = CHATML, **config: object) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; `config` goes into the latter."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIAL))
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    if template is not None:
        settings["chat_template"] = template
    return {"tokenizer.json": core.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
