# griffin serve on a CPU: docker build -t griffin . && docker run -p 8000:8000 -v griffin:/cache griffin -m smollm2-135m
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY native native
COPY src src
# The CPU's PyTorch first: the one that PyPI has for Linux brings gigabytes of CUDA. What torch needs has the versions of
# constraints.txt, which only PyPI is sure to have; of two torch 2.13.0 pip takes the one named +cpu.
RUN python -m venv /opt/griffin \
    && /opt/griffin/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch \
    && /opt/griffin/bin/pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM python:3.11-slim
# OpenMP's runtime, for PyTorch.
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home griffin \
    && mkdir /cache && chown griffin /cache
COPY --from=build /opt/griffin /opt/griffin
USER griffin
ENV PATH=/opt/griffin/bin:$PATH \
    GRIFFIN_CACHE=/cache \
    HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["griffin", "serve", "--host", "0.0.0.0", "--port", "8000", "--log-format", "json"]
