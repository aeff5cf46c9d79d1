/* One query over its past, for keys and values of type `real`, which `load` and `save` turn into float32 and back.

   q, out [rows, HEADS, GROUP, DIM]; keys, values [HEADS, capacity, DIM]; a row attends to [starts, ends). */
void decode(const real *q, const real *keys, const real *values, real *out, const long *starts, const long *ends,
            long rows, long capacity, float scale) {
    #pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < rows * HEADS; task++) {
        long row = task / HEADS, head = task % HEADS, length = ends[row] - starts[row];
        const real *key = keys + (head * capacity + starts[row]) * DIM, *query = q + task * GROUP * DIM;
        const real *value = values + (head * capacity + starts[row]) * DIM;
        float *scores = malloc(sizeof(float) * GROUP * length), sum[GROUP], total[GROUP][DIM] = {{0}}, asked[GROUP * DIM];
        for (int d = 0; d < GROUP * DIM; d++) asked[d] = load(query[d]);
        for (long t = 0; t < length; t++)
            for (int g = 0; g < GROUP; g++) {
                float dot = 0;
                #pragma omp simd reduction(+ : dot)
                for (int d = 0; d < DIM; d++) dot += asked[g * DIM + d] * load(key[t * DIM + d]);
                scores[g * length + t] = dot * scale;
            }
        for (int g = 0; g < GROUP; g++) {
            float *score = scores + g * length, most = -INFINITY, all = 0;
            #pragma omp simd reduction(max : most)
            for (long t = 0; t < length; t++) most = score[t] > most ? score[t] : most;
            #pragma omp simd reduction(+ : all)
            for (long t = 0; t < length; t++) { score[t] = exp_(score[t] - most); all += score[t]; }
            sum[g] = all;
        }
        for (long t = 0; t < length; t++)
            for (int g = 0; g < GROUP; g++) {
                float weight = scores[g * length + t];
                #pragma omp simd
                for (int d = 0; d < DIM; d++) total[g][d] += weight * load(value[t * DIM + d]);
            }
        for (int g = 0; g < GROUP; g++)
            for (int d = 0; d < DIM; d++) out[(task * GROUP + g) * DIM + d] = save(total[g][d] / sum[g]);
        free(scores);
    }
}
