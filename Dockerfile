# The image of the service.
#
#     docker build -t packshot .                                           (CUDA: run it with --gpus all)
#     docker build -t packshot --build-arg TORCH_INDEX=<index> .           (CPU: an index of torch builds without CUDA,
#                                                                           which make the image much smaller)
#
# CI does not build this image, because there is no container engine there. tests/unit/test_docker.py runs the RUN lines
# as they stand here in a virtual environment instead.
FROM python:3.11-slim

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

WORKDIR /packshot
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY conf conf
COPY src src
COPY data/models data/models

RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
RUN pip install -c constraints.txt ".[serve]"
RUN python -c "import packshot.serve.server" && packshot serve --help > /dev/null

# The run folder, with the stored jobs, lies in the volume. run.resume=true goes on with it after a restart.
RUN mkdir -p /runs && chown 1000 /runs
USER 1000
VOLUME /runs
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Keys: -e PACKSHOT_API_KEY=<key>, or serve.api_keys=<a mounted file>.
# Stop it with docker stop --time <serve.timeout_seconds>, so that requests in work are finished.
ENTRYPOINT ["packshot", "serve", "serve.host=0.0.0.0", "serve.port=8000", "run.dir=/runs/serve", "run.resume=true"]
