# In place of python:*-slim-bookworm: the same, with Debian's own Python 3.11.
FROM scratch
ADD base.tar /
RUN rm /usr/lib/python3*/EXTERNALLY-MANAGED && ln -s python3 /usr/bin/python
CMD ["python"]
