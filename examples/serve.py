"""Serve a MeteoRA checkpoint over an OpenAI-compatible endpoint, by the server behind ``transformers serve``.

    pip install 'transformers[serving]'
    python examples/serve.py --base HuggingFaceTB/SmolLM2-135M-Instruct --checkpoint mixture --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "meteora", "prompt": "...", "max_tokens": 20}'

``transformers serve`` itself loads models of its own classes by name alone; here its model manager is given ours. Chat,
streaming and the rest are the server's.
"""

import argparse

from transformers import AutoTokenizer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from meteora import MeteoraModel

NAME = "meteora"


def serve(model: MeteoraModel, tokenizer, **options) -> Serve:
    """Serve ``model`` under the name ``meteora``; ``options`` are those of ``transformers serve``."""

    class OneModel(model_manager.ModelManager):
        def _load_model(self, *args, **kwargs):
            return model

        def _load_processor(self, *args, **kwargs):
            return tokenizer

        @staticmethod
        def get_gen_models(cache_dir=None):  # what /v1/models lists
            return [{"id": NAME, "object": "model", "created": 0, "owned_by": ""}]

    original, model_manager.ModelManager = model_manager.ModelManager, OneModel  # Serve makes its manager itself
    try:
        return Serve(force_model=NAME, **options)
    finally:
        model_manager.ModelManager = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the base model: a directory or hub id")
    parser.add_argument("--checkpoint", required=True, help="what save_pretrained wrote: a directory or hub id")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    options = parser.parse_args()
    try:
        model = MeteoraModel.from_pretrained(options.base, options.checkpoint).to(options.device)
        tokenizer = AutoTokenizer.from_pretrained(options.base)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last is torch's, of a device that is none
        parser.error(str(error))
    serve(model, tokenizer, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
