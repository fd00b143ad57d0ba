# docker build -t llmc .
# docker run --rm --gpus all -v /models:/models -v "$PWD:/workspace" llmc --config /workspace/recipe.yml
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/llmc \
    PATH=/opt/llmc/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY llmc ./llmc
RUN pip install --no-cache-dir .

WORKDIR /workspace
ENTRYPOINT ["python3", "-m", "llmc"]
