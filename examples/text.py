import griffin

model, tokenizer = griffin.load("smollm2-135m")  # or a Hub id, a folder, a .gguf file
result = griffin.generate(model, tokenizer, "Once upon a time", density=0.5, max_tokens=60)
print(result.text, result.generation_tokens_per_s, result.ff_bytes_per_token)

messages = [{"role": "user", "content": "Hello"}]
for piece in griffin.stream_generate(model, tokenizer, messages, density=0.75, max_tokens=60):
    print(piece.text, end="")
