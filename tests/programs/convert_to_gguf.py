"""Runs llama.cpp's converter on a model whose tokenizer it does not know.

The converter recognises tokenizers by a hash. The demo's tokenizer is unknown to it and has no
merges, but only ids are fed to the model, so Llama's name and one dummy merge will do.
"""

import runpy
import sys

sys.path.insert(0, sys.argv[1].rsplit("/", 1)[0])
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
set_vocab = TextModel._set_vocab_gpt2


def with_merges(self):
    set_vocab(self)
    if not any("tokenizer.ggml.merges" in part for part in self.gguf_writer.kv_data):
        self.gguf_writer.add_token_merges(["0 0"])


TextModel._set_vocab_gpt2 = with_merges
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
