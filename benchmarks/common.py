"""Shared by the loops that this project is compared with. They load a model as any script does, without this project's
changes to it. Nothing here imports `tweet_qa_main`, which sets how torch allocates memory."""

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helper_functions import exact_match, quiet_libraries, semantic_similarity, token_f1


def load(model_folder, lora):
    """(model on the CPU, tokenizer). lora: None, or peft's arguments of the adapter to add."""
    quiet_libraries()
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", **lora))
    return model, tokenizer


def score(predictions, rows, sem_model):
    """Mean F1, EM and, with a similarity model, semantic similarity, each the best over the references."""
    references = [row["Answer"] for row in rows]
    scores = {
        "f1": [token_f1(*pair) for pair in zip(predictions, references, strict=True)],
        "em": [exact_match(*pair) for pair in zip(predictions, references, strict=True)],
    }
    if sem_model:
        scores["avg_sem_sim"] = semantic_similarity(sem_model, predictions, references)
    return {name: sum(values) / len(values) for name, values in scores.items()}
