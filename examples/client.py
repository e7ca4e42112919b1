"""Ask a running `griffin serve`."""

import openai

client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.create(
    model="smollm2-135m",
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_tokens=60,
    extra_body={"griffin": {"density": 0.75}},  # this request's own
)
print(answer.choices[0].message.content, answer.usage)
