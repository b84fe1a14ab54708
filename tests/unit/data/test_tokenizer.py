import json

import pytest
import tokenizers

from dist_attn.data.tokenizer import ByteTokenizer, load_tokenizer, token_dtype
from dist_attn.errors import CorpusError


@pytest.fixture
def path(tmp_path):
    """A word tokenizer with every setting that must not reach the corpus."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 9}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def encode(path, *texts):
    return [ids.tolist() for ids in load_tokenizer(str(path)).encode(texts)]


def test_bytes_end_with_their_own_token():
    tokenizer = ByteTokenizer()
    assert [x.tolist() for x in tokenizer.encode(["aé", ""])] == [[97, 195, 169, 256], []]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_nothing_is_truncated_padded_or_put_in_front(path):
    assert encode(path, "a b c a b", "") == [[1, 2, 0, 1, 2], []]
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocab_size == 10  # ids may have gaps
    assert tokenizer.eos_id is None


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "special": True}])
def test_end_token_is_the_one_of_the_file_beside(path, eos):
    before = load_tokenizer(str(path)).digest
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert encode(path, "a b", "") == [[1, 2, 9], []]
    assert load_tokenizer(str(path)).digest != before


def test_complaints(path):
    with pytest.raises(CorpusError, match="'bytes' or the path"):
        load_tokenizer("byte")
    side = path.with_name("tokenizer_config.json")
    side.write_text('{"eos_token": "<end>"}')
    with pytest.raises(CorpusError, match=r"'<end>' of .* is not in the vocabulary"):
        load_tokenizer(str(path))
    side.write_text("{")
    with pytest.raises(CorpusError, match=r"tokenizer_config\.json"):
        load_tokenizer(str(path))
    path.write_text('{"model": 1}')
    with pytest.raises(CorpusError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(path))


def test_text_that_the_tokenizer_cannot_encode(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?"))
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(CorpusError, match="cannot encode"):
        encode(tmp_path / "t.json", "zebra")


@pytest.mark.parametrize(("vocab", "dtype"), [(257, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_narrowest_type(vocab, dtype):
    assert token_dtype(vocab).name == dtype
