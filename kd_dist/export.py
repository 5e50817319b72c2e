"""From a trained student to a package: every format, proven, and what an app needs beside it."""
