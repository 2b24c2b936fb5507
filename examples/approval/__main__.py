"""The command: ``python -m examples.approval``, which serves the page."""

import argparse
from http.server import ThreadingHTTPServer

from examples.approval.page import Handler


def main():
    parser = argparse.ArgumentParser(
        prog='python -m examples.approval', description='Serve the page on which editors decide.'
    )
    parser.add_argument('--port', type=int, default=8000, help='default: 8000')
    with ThreadingHTTPServer(('127.0.0.1', parser.parse_args().port), Handler) as server:
        print(f'The page is at http://127.0.0.1:{server.server_port}/', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == '__main__':
    main()
