# shellcheck shell=sh
# What every shell on a node of the cluster knows: Ray's launcher runs its commands in login shells.
export PATH="$HOME/lorafleet-env/bin:$PATH"
# Ray lets in who has the token of ~/.ray/auth_token.
export RAY_AUTH_MODE=token
# Serve replaces a proxy that died after three looks at it; every 10 s would be 30 s in which nobody is answered.
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2
# From the proxy to a gateway by gRPC is quicker than by tasks of Ray's actors.
export RAY_SERVE_PROXY_USE_GRPC=1
# Headers that Ray cannot decode fail in the proxy, and others let clients turn off its timeout.
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy_headers.middlewares
# The folder that all nodes see.
export LORAFLEET_STATE=/mnt/lorafleet
