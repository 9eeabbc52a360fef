"""What every room uses: errors, pieces, untrusted files, dtypes, strips."""
