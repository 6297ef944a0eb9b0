"""The short-lived driver that starts Serve without any job's runtime environment."""

import sys


def main(address: str, port: str) -> None:
    """Import Ray, wait until standard input closes, start the controller and the proxy."""
    import ray
    from ray import serve

    sys.stdin.read()
    ray.init(address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})


if __name__ == "__main__":
    main(*sys.argv[1:])
