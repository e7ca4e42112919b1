"""Ask a running server by clients that people use: `python check.py URL MODEL`. Answers are compared with the API's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUESTION = "Name three rivers."
SCHEMA = {
    "title": "answer",
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["sure", "count"],
    "additionalProperties": False,
}


def plain(url: str, model: str) -> str:
    """The answer as the API gives it."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def by_llm(url: str, model: str, expected: str) -> None:
    """The command `llm`, with the server as an OpenAI-compatible model."""
    with tempfile.TemporaryDirectory() as folder:
        model_file = Path(folder) / "extra-openai-models.yaml"
        model_file.write_text(
            f"- model_id: {model}\n  model_name: {model}\n  api_base: {url}/v1\n  supports_schema: true\n"
        )
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

        def llm(*words: str) -> str:
            command = [str(Path(sys.executable).parent / "llm"), "-m", model, *words, "-o", "temperature", "0"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert llm(QUESTION, "-o", "max_tokens", "24").strip() == expected.strip()
        assert llm(QUESTION, "-o", "max_tokens", "24", "--no-stream").strip() == expected.strip()
        assert set(json.loads(llm(QUESTION, "--schema", json.dumps(SCHEMA)))) == {"sure", "count"}


def by_langchain(url: str, model: str, expected: str) -> None:
    """LangChain's ChatOpenAI, by both of the OpenAI API's endpoints."""
    from langchain_openai import ChatOpenAI

    settings: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0}
    for responses in (False, True):
        chat = ChatOpenAI(**settings, max_tokens=24, use_responses_api=responses)
        answer = chat.invoke(QUESTION)
        assert answer.text == expected
        assert "".join(part.text for part in chat.stream(QUESTION)) == expected
        assert chat.invoke([("user", QUESTION), answer, ("user", "And one more?")]).text  # an answer goes back
        form = ChatOpenAI(**settings, use_responses_api=responses).with_structured_output(SCHEMA, method="json_schema")
        got: Any = form.invoke(QUESTION)
        assert set(got) == {"sure", "count"}


def by_ollama(url: str, model: str, expected: str) -> None:
    """The ollama client."""
    import ollama

    client = ollama.Client(url)
    assert [one.model for one in client.list().models] == [f"{model}:latest"]
    messages = [{"role": "user", "content": QUESTION}]
    options = {"temperature": 0, "num_predict": 24}
    assert client.chat(model, messages, options=options).message.content == expected
    stream = client.chat(model, messages, options=options, stream=True)
    assert "".join(part.message.content or "" for part in stream) == expected
    form = client.generate(model, QUESTION, format=SCHEMA, options={"temperature": 0})
    assert set(json.loads(form.response)) == {"sure", "count"}


def main() -> None:
    """Try them all."""
    url, model = sys.argv[1:]
    expected = plain(url, model)
    for package, check in (("llm", by_llm), ("langchain-openai", by_langchain), ("ollama", by_ollama)):
        check(url, model, expected)
        print(f"{package} {version(package)}: answers as the API does")


if __name__ == "__main__":
    main()
