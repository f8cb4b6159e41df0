"""CTranslate2, an inference engine in C++, in float32: it validates and answers, but does not train.

Optional: `pip install -r benchmarks/requirements.txt`. Without it, the report says "not installed". It uses as many
threads for one batch as torch does, and batches of 32 rows that it sorts by length itself.
"""

import math
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common import score
from helper_functions import TweetQADataset, build_prompt, quiet_libraries

CONVERTED = Path(__file__).resolve().parent / "models"
BATCH_SIZE = 32


def is_installed():
    return find_spec("ctranslate2") is not None


def load(model_folder, lora=None, patience=1):
    """(Search, tokenizer) of a checkpoint, which is converted if that was not done since it was written.

    lora: None, as the other contenders take it. patience: see `Search`.
    """
    import ctranslate2
    import torch
    from transformers import AutoTokenizer

    quiet_libraries()
    there = CONVERTED / f"{Path(model_folder).name}.ct2"
    weights = Path(model_folder, "model.safetensors")
    if not there.exists() or there.stat().st_mtime < weights.stat().st_mtime:
        _converter(model_folder).convert(str(there), force=True)
    threads = torch.get_num_threads()
    translator = ctranslate2.Translator(str(there), compute_type="float32", inter_threads=1, intra_threads=threads)
    return Search(translator, patience), AutoTokenizer.from_pretrained(model_folder)


def _converter(model_folder):
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """Transformers 5 sets tie_word_embeddings in every T5's config, and the converter would scale the logits of all
        of them. What says whether to scale them is another setting now."""

        def load_model(self, *given, **options):
            model = super().load_model(*given, **options)
            model.config.tie_word_embeddings = model.config.scale_decoder_outputs
            return model

    return Converter(model_folder)


class Search:
    """CTranslate2's translator with one setting of its beam search.

    patience: the search of an example ends when beams * patience answers are finished. `generate` stops by another
    rule; with a patience as large as the beams both find the same answers, with less this may end earlier.
    """

    def __init__(self, translator, patience):
        self.translator, self.patience = translator, patience

    def answers(self, tokenizer, prompts, beams):
        """The stripped answers, and the mean log-probability of their tokens, of prompts (lists of token ids)."""
        found = self.translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(ids) for ids in prompts],
            max_batch_size=BATCH_SIZE,
            beam_size=beams,
            patience=self.patience,
            max_decoding_length=32,
            return_scores=True,
        )
        ids = [tokenizer.convert_tokens_to_ids(one.hypotheses[0]) for one in found]
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return texts, [one.scores[0] for one in found]

    def loss(self, tokenizer, prompts, targets):
        """Mean cross entropy (nats) of a token of the targets, lists of token ids with the end token."""
        scored = self.translator.score_batch(
            [tokenizer.convert_ids_to_tokens(ids) for ids in prompts],
            [tokenizer.convert_ids_to_tokens(ids[:-1]) for ids in targets],  # it adds the end token itself
            max_batch_size=BATCH_SIZE,
        )
        return -math.fsum(sum(one.log_probs) for one in scored) / sum(len(one.log_probs) for one in scored)


def validate(search, tokenizer, rows, beams, device, precision, sem_model=None):
    """(metrics, predictions) of the rows: the search with its scores, and a pass that scores the references."""
    data = TweetQADataset(rows, tokenizer)
    predictions, _ = search.answers(tokenizer, data.input_ids, beams)
    val_loss = search.loss(tokenizer, data.input_ids, data.labels)
    return score(predictions, rows, sem_model) | {"val_loss": val_loss}, predictions


def answer(search, tokenizer, questions, tweets, beams):
    """The answers to questions about tweets, from text to text."""
    prompts = [build_prompt(*pair) for pair in zip(questions, tweets, strict=True)]
    return search.answers(tokenizer, tokenizer(prompts).input_ids, beams)[0]
