"""Tokenizers of a few hundred tokens, trained where a test asks for one, saved the way real checkpoints carry them."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NllbTokenizer

ENGLISH = [
    "The old man sat by the river and watched the boats go by.",
    "She doesn't know what he wants, but she will ask him tomorrow!",
    "I'm sure they've seen it; we're not so sure. Is it 12,345 or 67?",
    "A small frog jumped into the cold water near the stone bridge.",
    "Children play in the garden while their parents drink some tea.",
] * 4
GERMAN = [
    "Der alte Mann saß am Fluss und sah den Booten zu.",
    "Sie weiß nicht, was er möchte, aber sie fragt ihn morgen!",
    "Ich bin mir sicher, dass sie es gesehen haben; wir nicht. Sind es 12.345?",
    "Ein kleiner Frosch sprang bei der Brücke ins kalte Wasser.",
    "Kinder spielen im Garten, während ihre Eltern etwas Tee trinken.",
] * 4
SENTENCES = [
    "The old man asked the children.",
    "  two   spaces  and a trailing one ",
    "It's 12,345 … isn't it? We're sure!",
    "Unseen: 漢字 and Ωmega, frog漢frog.",
    "ﬁne ligatures and ½ fractions",
    "a\ttab and a\nnewline",
    "x",
]


def write_config(directory: Path, **config: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def train_sentencepiece(
    path: Path, sentences: list[str], size: int, model_type: str = "unigram", **options: object
) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=size,
        model_type=model_type,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def pieces(model: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]


def bert(directory: Path) -> Path:
    """WordPiece, as vocab.txt alone."""
    write_config(directory, model_type="bert")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line.lower() for line in ENGLISH], trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (directory / "vocab.txt").write_text("\n".join(token for token, _ in vocabulary))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 16, "clean_up_tokenization_spaces": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def prophetnet(directory: Path) -> Path:
    """BERT's word pieces under another name, with a second separator."""
    bert(directory)
    pieces_of_bert = (directory / "vocab.txt").read_text("utf-8")
    (directory / "vocab.txt").unlink()
    (directory / "prophetnet.tokenizer").write_text(pieces_of_bert + "\n[X_SEP]", "utf-8")
    write_config(directory, model_type="prophetnet")
    settings = {"tokenizer_class": "ProphetNetTokenizer", "model_max_length": 16}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def t5(directory: Path) -> Path:
    """Unigram, as spiece.model alone."""
    write_config(directory, model_type="t5")
    train_sentencepiece(
        directory / "spiece.model", ENGLISH, 160, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False
    )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 5, "model_max_length": 512}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(ENGLISH, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def gpt2(directory: Path) -> Path:
    """Byte-level BPE, as vocab.json and merges.txt, without a padding token."""
    write_config(directory, model_type="gpt2")
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.model.save(str(directory))
    vocabulary = json.loads((directory / "vocab.json").read_text())
    (directory / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": len(vocabulary)}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return directory


def whisper(directory: Path, *, multilingual: bool) -> Path:
    """Byte-level BPE with Whisper's special tokens, as tokenizer.json, and Whisper's generation_config.json."""
    write_config(directory, model_type="whisper", num_mel_bins=128 if multilingual else 80)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startofprev|>", "<|notimestamps|>"]
    tokenizer = byte_level(special)
    tokenizer.add_tokens([f"<|{seconds / 50:.2f}|>" for seconds in range(1501)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "WhisperTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = tokenizer.token_to_id
    generation = {"no_timestamps_token_id": ids("<|notimestamps|>"), "is_multilingual": multilingual}
    if multilingual:
        generation["lang_to_id"] = {token: ids(token) for token in ("<|en|>", "<|de|>")}
        generation["task_to_id"] = {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def marian(directory: Path, *, codes: tuple[str, ...] = (), model_type: str = "unigram") -> Path:
    """Two sentencepiece models and a vocab.json that covers neither wholly and orders its ids its own way."""
    write_config(directory, model_type="marian")
    source = train_sentencepiece(directory / "source.spm", ENGLISH, 150, model_type, hard_vocab_limit=False)
    target = train_sentencepiece(directory / "target.spm", GERMAN, 150, model_type, hard_vocab_limit=False)
    shared = sorted({*pieces(source), *pieces(target)} - {"<unk>", "<s>", "</s>"})
    kept = [piece for index, piece in enumerate(shared) if index % 13]
    tokens = ["</s>", "<unk>", *kept, *codes, "<pad>"]
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    settings = {
        "tokenizer_class": "MarianTokenizer",
        "source_lang": "eng",
        "target_lang": "deu",
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def m2m100(directory: Path) -> Path:
    """One sentencepiece BPE model, a vocab.json that misses some of its pieces, languages after the vocabulary."""
    write_config(directory, model_type="m2m_100")
    model = train_sentencepiece(directory / "sentencepiece.bpe.model", ENGLISH + GERMAN, 200, "bpe")
    kept = [piece for index, piece in enumerate(pieces(model)[3:]) if index % 17 != 16]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *kept]
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    settings = {"tokenizer_class": "M2M100Tokenizer", "src_lang": "en", "tgt_lang": "de", "model_max_length": 1024}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def mbart(directory: Path) -> Path:
    """One sentencepiece Unigram model; languages after the vocabulary, the source's after the text."""
    write_config(directory, model_type="mbart")
    train_sentencepiece(directory / "sentencepiece.bpe.model", ENGLISH + GERMAN, 200, hard_vocab_limit=False)
    settings = {"tokenizer_class": "MBartTokenizer", "src_lang": "en_XX", "tgt_lang": "de_DE"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def nllb(directory: Path) -> Path:
    """BPE, as tokenizer.json; languages after the vocabulary, the source's before the text."""
    write_config(directory, model_type="m2m_100")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        ENGLISH + GERMAN, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    NllbTokenizer(vocab=model["vocab"], merges=merges, src_lang="eng_Latn").save_pretrained(directory)
    return directory


def speecht5(directory: Path, *, config: bool = True) -> Path:
    """Characters, as spm_char.model alone; <pad> and the like are pieces of the model's."""
    directory.mkdir(parents=True, exist_ok=True)
    if config:
        write_config(directory, model_type="speecht5")
    options = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    train_sentencepiece(directory / "spm_char.model", ENGLISH, 50, "char", hard_vocab_limit=False, **options)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SpeechT5Tokenizer"}))
    return directory
