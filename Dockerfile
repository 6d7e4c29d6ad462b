# Two images of one repository. `docker build --target api .` has no torch in it; `--target worker` has the engine.
# Plain pip decides which build of torch the worker gets: the default index's is the one for CUDA.

FROM python:3.11-slim-bookworm AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv

# Dependencies come before the code, so that a change of code does not install them again.
FROM python AS api-build
WORKDIR /src
COPY requirements-api.lock ./
RUN pip install -r requirements-api.lock
COPY . .
RUN pip install --no-deps --no-build-isolation .

# The lock as a constraint: the engine at its pinned versions, without the development tools that are pinned beside it.
FROM python AS worker-build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY requirements.lock requirements-api.lock pyproject.toml README.md LICENSE ./
RUN pip install -r requirements-api.lock && pip install -c requirements.lock --no-build-isolation '.[engine]'
COPY . .
RUN pip install --no-deps --no-build-isolation --force-reinstall .

FROM python AS runtime
RUN useradd --uid 10001 --create-home bitmill && install -d -o bitmill -g bitmill /data /models
USER bitmill
WORKDIR /home/bitmill
ENV BITMILL_DATA_DIR=/data
VOLUME /data

FROM runtime AS worker
COPY --from=worker-build /opt/venv /opt/venv
CMD ["bitmill", "worker"]

FROM runtime AS api
COPY --from=api-build /opt/venv /opt/venv
ENV BITMILL_HOST=0.0.0.0
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
CMD ["bitmill", "serve"]
