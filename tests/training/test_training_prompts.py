"""Text to token ids: what training, scoring and generation share."""

import pytest
from tiny_language_model import BOS, EOS, WRONG_EOS, tiny_model, tiny_tokenizer

from lorafleet.prompts import encode_answer, encode_prompt, end_token, end_tokens


def test_bos_stands_once_where_the_tokenizer_adds_one():
    assert encode_prompt(tiny_tokenizer(), "abc", 10).count(BOS) == 1
    assert encode_prompt(tiny_tokenizer(), "<s>abc", 10) == encode_prompt(tiny_tokenizer(), "abc", 10)
    assert BOS not in encode_prompt(tiny_tokenizer(adds_bos=False), "abc", 10)


def test_a_long_prompt_keeps_head_and_tail():
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, "instruction" + "x" * 500 + "question", 24)
    assert len(ids) == 24
    assert tokenizer.decode(ids) == "<s>instruction" + "xxxx" + "question"


def test_an_answer_is_encoded_as_it_follows_a_prompt():
    tokenizer = tiny_tokenizer()
    whole = encode_prompt(tokenizer, "Answer: größer", 100)
    assert encode_prompt(tokenizer, "Answer:", 100) + encode_answer(tokenizer, "größer") == whole


def test_the_model_is_believed_where_its_tokenizer_names_another_end():
    assert end_token(tiny_tokenizer(eos_token="<|im_start|>"), tiny_model()) == EOS
    assert end_token(tiny_tokenizer(), tiny_model()) == EOS
    several = tiny_model()
    several.generation_config.eos_token_id = [EOS, WRONG_EOS]
    assert end_token(tiny_tokenizer(eos_token="<|im_start|>"), several) == WRONG_EOS


def test_the_end_that_training_writes_is_one_that_ends_answers():
    several, none = tiny_model(), tiny_model()
    several.generation_config.eos_token_id = [EOS, WRONG_EOS, 77]
    none.generation_config.eos_token_id = none.config.eos_token_id = None
    misled = tiny_tokenizer(eos_token="<|im_start|>")
    assert end_tokens(misled, tiny_model()) == {EOS}, "the tokenizer adds none to those of the model"
    assert end_tokens(misled, several) == {EOS, WRONG_EOS, 77}
    assert end_tokens(misled, none) == {WRONG_EOS}, "it is believed where nobody else names one"
    for model in (tiny_model(), several, none):
        for tokenizer in (misled, tiny_tokenizer()):
            assert end_token(tokenizer, model) in end_tokens(tokenizer, model)
    misled.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        end_tokens(misled, none)
