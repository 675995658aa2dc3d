/* Compares the functions of prefgpt.c with the golden trace, array by array.
 *
 *     cc -std=c99 -O3 -o trace trace.c -lm && ./trace              in the folder of the .npz files
 *     cc -std=c99 -O3 -Dreal=double -o trace trace.c -lm           the same in float64, at 1e-7
 *
 * For each array it puts its own numbers into a list, in the order of the file, and then checks the
 * list against the file. README.md says what each array is. */
#define main train_all
#include "prefgpt.c"
#undef main
#include <stdarg.h>
#include <stddef.h>

/* ------------------------------------------------------------------------------ reading .npz files
   An .npz is a zip archive without compression. Its end names the place of a directory, and the
   directory the place of each file. (The sizes before a file's own bytes may be missing: zip64.) */
enum { MOST = 200000 };
static const char *folder;
static int failures, checked;

typedef struct { const unsigned char *data; char type; int count; } Array;

static long bytes(const unsigned char *at, int count) {         /* little-endian */
    return count ? at[0] | bytes(at + 1, count - 1) << 8 : 0;
}

/* Returns the bytes of FOLDER/file.npz, which stay in memory. */
static const unsigned char *contents(const char *file, long *size) {
    static struct { char name[20]; unsigned char *bytes; long size; } kept[20];
    int i = 0;
    while (kept[i].bytes && strcmp(kept[i].name, file)) i++;
    if (!kept[i].bytes) {
        char path[1000];
        snprintf(path, sizeof path, "%s/%s.npz", folder, file);
        FILE *stream = fopen(path, "rb");
        if (!stream) perror(path), exit(2);
        kept[i].bytes = malloc(1 << 20), strcpy(kept[i].name, file);
        kept[i].size = fread(kept[i].bytes, 1, 1 << 20, stream);
        fclose(stream);
    }
    *size = kept[i].size;
    return kept[i].bytes;
}

static Array array(const char *file, const char *name) {
    long size;
    const unsigned char *zip = contents(file, &size), *end = zip + size - 22;
    const unsigned char *entry = zip + bytes(end + 16, 4);
    for (int i = 0; i < bytes(end + 10, 2); i++) {
        long length = bytes(entry + 28, 2);
        if (length == (long)strlen(name) + 4 && !memcmp(entry + 46, name, length - 4)) {
            const unsigned char *local = zip + bytes(entry + 42, 4);
            const unsigned char *npy = local + 30 + bytes(local + 26, 2) + bytes(local + 28, 2);
            char header[1000] = "", *at;
            memcpy(header, npy + 10, bytes(npy + 8, 2) < 999 ? bytes(npy + 8, 2) : 999);
            Array a = {npy + 10 + bytes(npy + 8, 2), *(strstr(header, "'descr': '") + 11), 1};
            at = strchr(strstr(header, "'shape'"), '(') + 1;
            while (*at != ')') {
                a.count *= strtol(at, &at, 10);
                at += strspn(at, ", ");
            }
            return a;
        }
        entry += 46 + length + bytes(entry + 30, 2) + bytes(entry + 32, 2);
    }
    fprintf(stderr, "%s.npz has no %s\n", file, name), exit(2);
}

static double item(Array a, int i) {
    float number;
    if (a.type == 'b') return a.data[i];
    if (a.type == 'i') return bytes(a.data + 8 * i, 4);         /* small and not negative */
    memcpy(&number, a.data + 4 * i, 4);
    return number;
}

/* ------------------------------------------------------------------------------------ comparing */
static const double ANYTHING = 1e300;                           /* put where nothing is compared */
static double ours[MOST];
static int count;

static void put(double z) { ours[count++] = z; }
static void put_all(const real *z, int n) { for (int i = 0; i < n; i++) put(z[i]); }

static void check(const char *file, const char *name, ...) {    /* the name as of printf */
    char full[80];
    va_list rest;
    va_start(rest, name), vsnprintf(full, sizeof full, name, rest), va_end(rest);
    Array a = array(file, full);
    double most = sizeof(real) == 8 ? 1e-7 : strstr(full, "after") ? 1e-4 : 1e-5, worst = 0;
    double relative = sizeof(real) == 8 ? 1e-7 : 1e-5;
    for (int i = 0; i < a.count && i < count; i++) {
        double theirs = item(a, i), gap = fabs(ours[i] - theirs);
        double allowed = a.type == 'f' ? most + relative * fabs(theirs) : 0;
        if (ours[i] != ANYTHING && !(gap <= allowed))
            worst = gap > worst ? gap : isnan(gap) ? INFINITY : worst;
    }
    if (a.count != count || worst > 0) {
        printf("%s/%s DIFFERS by %.3g, %d numbers of %d\n", file, full, worst, count, a.count);
        failures++;
    }
    count = 0, checked++;
}

/* The names of a model's tensors, in their order: PREFIX followed by these */
static const char *tensor_name(const Model *m, int k) {
    static const char *layers[] = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc",
                                   "mlp.c_proj"};
    static char name[80];
    const char *body = m->tensors > SCORE(m) ? "body." : "", *end = k % 2 ? "bias" : "weight";
    if (k == SCORE(m)) return "score.weight";
    if (k < 2) snprintf(name, sizeof name, "%s%s.weight", body, k ? "wpe" : "wte");
    else if (k >= LN_F(m)) snprintf(name, sizeof name, "%sln_f.%s", body, end);
    else snprintf(name, sizeof name, "%sh.%d.%s.%s", body, (k - 2) / 12, layers[(k - 2) % 12 / 2],
                  end);
    return name;
}

static void check_weights(const char *file, const char *prefix, const Model *m) {
    for (int k = 0; k < m->tensors; k++) {
        put_all(m->tensor[k].w, m->tensor[k].size);
        check(file, "%s%s", prefix, tensor_name(m, k));
    }
}

static double gradient_norm(const Model *m) {
    double sum = 0;
    for (int k = 0; k < m->tensors; k++)
        for (int i = 0; i < m->tensor[k].size; i++)
            sum += (double)m->tensor[k].g[i] * m->tensor[k].g[i];
    return sqrt(sum);
}

/* Checks gradients and norm, takes a step and checks the weights: PREFIXgrads.W, norm, after.W. */
static void check_step(const char *file, const char *prefix, Model *m, double rate) {
    char after[40];
    for (int k = 0; k < m->tensors; k++) {
        put_all(m->tensor[k].g, m->tensor[k].size);
        check(file, "%sgrads.%s", prefix, tensor_name(m, k));
    }
    put(step(m, rate)), check(file, "%snorm", prefix);
    snprintf(after, sizeof after, "%safter.", prefix);
    check_weights(file, after, m);
}

static void check_number(const char *file, const char *name, double number) {
    put(number), check(file, "%s", name);
}

/* ----------------------------------------------------------------------------------- the trace */
enum { B = 8, N = 4, T = 10, V = 17, EOS = 16, C = 16 };
static Row rows[B];                             /* 0 .. 3 chosen, 4 .. 7 rejected */
static Row pairs[B];                            /* the same, rejected rows after their chosen */

static int real_length(const Row *row) { return row->n < T ? row->n : T; }     /* of x */
static int inside(const Row *row, int t) { return row->p - 1 <= t && t < row->n - 1; }

/* Checks an array (B, T) that is elsewhere off the mask. */
static void check_grid(const char *file, const char *name, real z[][MAX_S], double elsewhere) {
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) put(inside(&rows[b], t) ? z[b][t] : elsewhere);
    check(file, "%s", name);
}

static Model load(const char *name, int scalar) {
    Model m = new_model(V, 32, 2, 2, C, scalar);
    for (int k = 0; k < m.tensors; k++) {
        char full[80];
        snprintf(full, sizeof full, "%s.%s", name, tensor_name(&m, k));
        Array a = array("model", full);
        for (int i = 0; i < a.count; i++) m.tensor[k].w[i] = item(a, i);
    }
    return m;
}

static void load_rows(void) {
    Array tokens = array("batch", "tokens"), p = array("batch", "prompt_lengths");
    Array r = array("batch", "response_lengths");
    for (int b = 0; b < B; b++) {
        rows[b].p = item(p, b), rows[b].n = rows[b].p + item(r, b);
        for (int t = 0; t < rows[b].n; t++) rows[b].id[t] = item(tokens, b * (T + 1) + t);
        pairs[b % N * 2 + b / N] = rows[b];
    }
}

/* A (B, T, width) array of the real positions; z points to width numbers of position t of row b */
static void check_positions(const char *name, Pass *passes, size_t offset, int stride, int width) {
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            for (int c = 0; c < width; c++)
                put(t < real_length(&rows[b])
                    ? ((real *)((char *)&passes[b] + offset))[t * stride + c] : ANYTHING);
    check("batch", "%s", name);
}

static void batch_file(const Model *policy) {
    static Pass passes[B];
    static real logprob[B][MAX_S];
    for (int b = 0; b < B; b++) forward(policy, &passes[b], rows[b].id, 0, real_length(&rows[b]));
#define POSITIONS(name, field, width) \
    check_positions(name, passes, offsetof(Pass, field), sizeof passes->field[0] / sizeof(real), \
                    width)
    POSITIONS("embedded", layer[0].in, C);
    POSITIONS("h0.ln_1", layer[0].ln_1, C);
    POSITIONS("h0.qkv", layer[0].qkv, 3 * C);
    POSITIONS("h0.heads", layer[0].heads, C);
    POSITIONS("h0.attention", layer[0].attention, C);
    POSITIONS("h0.ln_2", layer[0].ln_2, C);
    POSITIONS("h0.fc", layer[0].fc, 4 * C);
    POSITIONS("h0.gelu", layer[0].gelu, 4 * C);
    POSITIONS("h0.mlp", layer[0].mlp, C);
    POSITIONS("h0.out", layer[1].in, C);
    POSITIONS("h1.out", layer[2].in, C);
    POSITIONS("hidden", hidden, C);
    for (int b = 0; b < B; b++)
        RESPONSE(t, rows[b])
            for (int v = 0; v < V; v++)
                put(dot(passes[b].hidden[t], policy->tensor[WTE].w + v * C, C));
    check("batch", "logits");
    for (int b = 0; b < B; b++) put(logprobs(policy, &rows[b], 1, logprob[b]));
    check("batch", "seq_logprobs");
    check_grid("batch", "logprobs", logprob, 0);
    for (int b = 0; b < B; b++) logprobs(policy, &rows[b], 0.7, logprob[b]);
    check_grid("batch", "logprobs_t07", logprob, 0);
}

static void check_draws(const char *file, const char *name, const char *u_name, Array logits, int n,
                        double temperature) {
    Array u = array(file, u_name);
    for (int i = 0; i < n; i++) {
        real z[V];
        int largest = 0;
        for (int v = 0; v < V; v++) {
            z[v] = item(logits, i * V + v) / (temperature ? temperature : 1);
            largest = z[v] > z[largest] ? v : largest;
        }
        softmax(z, V), put(temperature ? draw(z, V, item(u, i)) : largest);
    }
    check(file, "%s", name);
}

static void respond_greedily(const Model *policy, Row *row) {
    int id = -1;
    for (row->n = row->p; row->n < row->p + 8 && id != EOS; row->id[row->n++] = id) {
        real logit[V];
        forward(policy, &pass, row->id, 0, row->n);
        for (int v = id = 0; v < V; v++) {
            logit[v] = dot(pass.hidden[row->n - 1], policy->tensor[WTE].w + v * C, C);
            id = logit[v] > logit[id] ? v : id;
        }
    }
}

static void sample_file(const Model *policy) {
    Array prompts = array("sample", "prompts"), lengths = array("sample", "prompt_lengths");
    Array u = array("sample", "u");
    const char *ends[] = {"", "_t07", "_t0"};
    const double temperatures[] = {1, 0.7, 0};
    for (int k = 0; k < 3; k++) {
        Row sampled[6];
        char name[40];
        int longest = 0;
        snprintf(name, sizeof name, "draws%s", ends[k]);
        check_draws("sample", name, "draw_u", array("sample", "draw_logits"), 14, temperatures[k]);
        for (int i = 0; i < 6; i++) {
            real numbers[8];
            for (int j = 0; j < 8; j++) numbers[j] = item(u, i * 8 + j);
            sampled[i].p = item(lengths, i);
            for (int t = 0; t < sampled[i].p; t++) sampled[i].id[t] = item(prompts, i * 5 + t);
            if (k < 2) respond(policy, &sampled[i], EOS, 8, temperatures[k], numbers);
            else respond_greedily(policy, &sampled[i]);
            longest = sampled[i].n > longest ? sampled[i].n : longest;
        }
        for (int i = 0; i < 6; i++)
            for (int t = 0; t < longest; t++) put(t < sampled[i].n ? sampled[i].id[t] : 0);
        check("sample", "tokens%s", ends[k]);
        for (int i = 0; i < 6; i++)
            for (int t = 0; t < longest - 1; t++) put(inside(&sampled[i], t));
        check("sample", "response_mask%s", ends[k]);
        if (k == 0) {
            for (int i = 0; i < 6; i++) {
                forward(policy, &pass, sampled[i].id, 0, sampled[i].n - 1);
                RESPONSE(t, sampled[i])
                    for (int v = 0; v < V; v++)
                        put(dot(pass.hidden[t], policy->tensor[WTE].w + v * C, C));
            }
            check("sample", "logits");
        }
    }
}

static void sft_file(const Model *start) {
    Model policy = copy_of(start, 0);
    for (int s = 0; s < 11; s++) put(rate(s, 11, 1, 4));
    check("sft", "schedule");
    for (int s = 0; s < 2; s++) {
        const char *prefix = s ? "second." : "first.";
        double loss = 0, lr = rate(s, 10, 0.01, 2);
        int M = 0;
        for (int b = 0; b < B; b++) M += response(&rows[b]);
        for (int b = 0; b < B; b++) loss += sft(&policy, &rows[b], 1.0 / M);
        put(loss), check("sft", "%sloss", prefix), put(lr), check("sft", "%slr", prefix);
        check_step("sft", prefix, &policy, lr);
        put_all(policy.tensor[LN_F(&policy) + 1].m, C), check("sft", "%sm.ln_f.bias", prefix);
        put_all(policy.tensor[LN_F(&policy) + 1].v, C), check("sft", "%sv.ln_f.bias", prefix);
    }
}

static double rm_file(const Model *start) {             /* returns the shift */
    Model m = copy_of(start, 1);
    real scores[B], z[MAX_S];
    double loss = 0, shift = 0;
    for (int b = 0; b < B; b++) {
        numbers(&m, &rows[b], rows[b].n, z);
        for (int t = 0; t <= T; t++) put(t < rows[b].n ? z[t] : ANYTHING);
    }
    check("rm", "scores_everywhere");
    for (int b = 0; b < B; b++) put(scores[b] = score(&m, &rows[b])), shift += scores[b] / B;
    check("rm", "scores"), check_number("rm", "shift", shift);
    put_all(scores, N), check("rm", "chosen"), put_all(scores + N, N), check("rm", "rejected");
    for (int i = 0; i < N; i++) put(-log_sigmoid(scores[i] - scores[i + N]));
    check("rm", "losses");
    for (int i = 0; i < N; i++) loss += rm(&m, &pairs[2 * i], 1.0 / N);
    check_number("rm", "loss", loss);
    check_step("rm", "", &m, 0.005);
    return shift;
}

static void dpo_file(const Model *start, const Model *ref) {
    Model policy = copy_of(start, 0);
    const char *names[] = {"chosen", "rejected", "ref_chosen", "ref_rejected"};
    real unused[MAX_S];
    double sums[4][N], slope;
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < N; i++)
            put(sums[k][i] = logprobs(k < 2 ? &policy : ref, &rows[k % 2 * N + i], 1, unused));
        check("dpo", "%s", names[k]);
    }
    for (int i = 0; i < N; i++)
        pairs[2 * i].ref = sums[2][i], pairs[2 * i + 1].ref = sums[3][i];
    for (int k = 0; k < 3; k++) {                       /* DPO itself last: its gradients stay */
        const char *end = k == 0 ? "_ipo" : k == 1 ? "_smoothed" : "";
        double loss = 0;
        set.ipo = k == 0, set.label_smoothing = k == 1 ? 0.1 : 0;
        for (int i = 0; i < N; i++)
            put(dpo_loss((sums[0][i] - sums[2][i]) - (sums[1][i] - sums[3][i]), &slope));
        check("dpo", "losses%s", end);
        for (int i = 0; i < N; i++) loss += dpo(&policy, &pairs[2 * i], 1.0 / N);
        put(loss), check("dpo", "loss%s", end);
        if (k == 2) break;
        put(gradient_norm(&policy)), check("dpo", "norm%s", end);
        for (int j = 0; j < policy.tensors; j++)
            memset(policy.tensor[j].g, 0, policy.tensor[j].size * sizeof(real));
    }
    for (int i = 0; i < N; i++)
        put(set.beta * ((sums[0][i] - sums[2][i]) - (sums[1][i] - sums[3][i])));
    check("dpo", "margin");
    check_step("dpo", "", &policy, 0.005);
}

static void ppo_file(const Model *start, const Model *start_ref, const Model *start_value,
                     const Model *reward_model, double shift) {
    static Episode e[B];
    Model policy = copy_of(start, 0), value_model = copy_of(start_value, 1);
    Model ref = copy_of(start_ref, 0);
    double score = 0, kl = 0, entropy = 0, length = 0, ended = 0, slope;
    for (int b = 0; b < B; b++) {
        e[b].row = rows[b];
        assess(&e[b], &policy, &ref, reward_model, shift, &value_model, EOS);
        score += e[b].raw / B, ended += (double)e[b].ended / B;
        length += (double)response(&rows[b]) / B;
        RESPONSE(t, rows[b]) {
            kl += (e[b].logprob[t] - e[b].ref_logprob[t]) / B;
            entropy -= e[b].logprob[t];
        }
    }
    whiten(e, B);
#define EPISODES(name, expression) \
    for (int b = 0; b < B; b++) \
        for (int t = 0; t < T; t++) put(inside(&rows[b], t) ? (expression) : 0); \
    check("ppo", name)
    EPISODES("logprobs", e[b].logprob[t]);
    EPISODES("ref_logprobs", e[b].ref_logprob[t]);
    EPISODES("kl", e[b].logprob[t] - e[b].ref_logprob[t]);
    EPISODES("rewards", e[b].reward[t]);
    EPISODES("advantages", e[b].advantage[t]);
    EPISODES("returns", e[b].returns[t]);
    EPISODES("advantages_white", e[b].white[t]);
    static Episode flat[B];
    memcpy(flat, e, sizeof e);
    for (int b = 0; b < B; b++) for (int t = 0; t < T; t++) flat[b].advantage[t] *= 1e-4;
    whiten(flat, B);
    EPISODES("flat_white", flat[b].white[t]);
    for (int b = 0; b < B; b++) {
        real value[MAX_S];
        numbers(&value_model, &rows[b], real_length(&rows[b]), value);
        for (int t = 0; t < T; t++) put(t < real_length(&rows[b]) ? value[t] : ANYTHING);
    }
    check("ppo", "values");
    for (int b = 0; b < B; b++) put(e[b].raw);
    check("ppo", "raw_scores");
    for (int b = 0; b < B; b++) put(e[b].ended);
    check("ppo", "ended");
    for (int b = 0; b < B; b++) {                       /* the last reward without its kl */
        int t = rows[b].n - 2;
        put(e[b].reward[t] + set.beta * (e[b].logprob[t] - e[b].ref_logprob[t]));
    }
    check("ppo", "scores");
    check_number("ppo", "logged.score", score), check_number("ppo", "logged.kl", kl);
    check_number("ppo", "logged.entropy", entropy / (B * length));
    check_number("ppo", "logged.length", length), check_number("ppo", "logged.eos", ended);
    Array value = array("ppo", "near.values"), old = array("ppo", "near.old_values");
    Array target = array("ppo", "near.returns");
    for (int i = 0; i < value.count; i++)
        value_loss(item(value, i), item(old, i), item(target, i), &slope), put(slope);
    check("ppo", "near.slopes");

    Array minibatches = array("ppo", "minibatches");
    for (int s = 0; s < 2; s++) {
        const char *prefix = s ? "second" : "first";
        char name[40];
        int M = 0, r[4];
        double pg_loss = 0, vf_loss = 0, plain = 0;
        real logprob[4][MAX_S] = {{0}}, value[4][MAX_S] = {{0}};
        for (int i = 0; i < 4; i++) {
            r[i] = item(minibatches, 4 * s + i), M += response(&rows[r[i]]);
            logprobs(&policy, &rows[r[i]], set.temperature, logprob[i]);
            numbers(&value_model, &rows[r[i]], real_length(&rows[r[i]]), value[i]);
        }
#define MINIBATCH(name, elsewhere, expression) \
    for (int i = 0; i < 4; i++) \
        for (int t = 0; t < T; t++) { \
            const Episode *old = &e[r[i]]; \
            double new = logprob[i][t], v = value[i][t]; \
            (void)old, (void)new, (void)v; \
            put(inside(&old->row, t) ? (expression) : (elsewhere)); \
        } \
    check("ppo", "%s." name, prefix)
        MINIBATCH("logprobs", 0, new);
        MINIBATCH("ratio", 1, exp(new - old->logprob[t]));
        MINIBATCH("values", t < real_length(&old->row) ? v : ANYTHING, v);
        MINIBATCH("pg_losses", 0, policy_loss(new, old->logprob[t], old->white[t], &slope));
        MINIBATCH("vf_losses", 0, value_loss(v, old->value[t], old->returns[t], &slope));
        set.vf_clip = 0;
        MINIBATCH("vf_losses_unclipped", 0, value_loss(v, old->value[t], old->returns[t], &slope));
        for (int i = 0; i < 4; i++)
            RESPONSE(t, rows[r[i]])
                plain += value_loss(value[i][t], e[r[i]].value[t], e[r[i]].returns[t], &slope) / M;
        set.vf_clip = 0.2;
        for (int i = 0; i < 4; i++)
            pg_loss += ppo(&policy, &value_model, &e[r[i]], 1.0 / M, &vf_loss);
        put(pg_loss), check("ppo", "%s.pg_loss", prefix);
        put(vf_loss), check("ppo", "%s.vf_loss", prefix);
        put(plain), check("ppo", "%s.vf_loss_unclipped", prefix);
        snprintf(name, sizeof name, "%s.policy.", prefix);
        check_step("ppo", name, &policy, 0.004);
        snprintf(name, sizeof name, "%s.value.", prefix);
        check_step("ppo", name, &value_model, 0.003);
    }
    for (int k = 0; k < ref.tensors; k++)
        for (int i = 0; i < ref.tensor[k].size; i++)
            ref.tensor[k].w[i] += 0.25 * (policy.tensor[k].w[i] - ref.tensor[k].w[i]);
    check_weights("ppo", "ref_after.", &ref);
}

/* Fills z with a row of a stored array. */
static void take(real *z, Array a, int row, int width) {
    for (int i = 0; i < width; i++) z[i] = item(a, row * width + i);
}

static void edge_file(void) {
    Array logits = array("edge", "logits"), targets = array("edge", "targets");
    Model words = new_model(V, 1, 0, 1, 24, 0);         /* its logits are its hidden state */
    for (int v = 0; v < V; v++) words.tensor[WTE].w[24 * v + v] = 1;
    for (int slopes = 0; slopes < 2; slopes++) {
        for (int i = 0; i < 4; i++) {
            real probability[V];
            memset(pass.hidden[0], 0, sizeof pass.hidden[0]), take(pass.hidden[0], logits, i, V);
            real logprob = log_softmax(&words, 0, 1, item(targets, i), probability);
            if (!slopes) put(logprob);
            else for (int v = 0; v < V; v++) put((v == item(targets, i)) - probability[v]);
        }
        check("edge", slopes ? "logit_slopes" : "logprobs");
    }
    check_draws("edge", "draws", "u", logits, 4, 1);
    Array margins = array("edge", "margins");
    for (int i = 0; i < margins.count; i++) put(-log_sigmoid(item(margins, i)));
    check("edge", "losses");
    for (int i = 0; i < margins.count; i++) put(-sigmoid(-item(margins, i)));
    check("edge", "loss_slopes");

    Model unit = new_model(8, 1, 0, 1, C, 0);           /* its only LayerNorm: weight 1, bias 0 */
    initialize(&unit, 0, 1);
    real z[3][C], d[3][C], out[3][C], dz[3][C] = {{0}};
    for (int i = 0; i < 3; i++) {
        take(z[i], array("edge", "z"), i, C), take(d[i], array("edge", "d"), i, C);
        norm(out[i], z[i], &unit.tensor[LN_F(&unit)]);
        norm_back(dz[i], d[i], z[i], &unit.tensor[LN_F(&unit)]);
    }
    put_all(out[0], 3 * C), check("edge", "norm"), put_all(dz[0], 3 * C), check("edge", "dz");

    static Layer layer;
    for (int t = 0; t < 6; t++) {
        take(layer.qkv[t], array("edge", "qkv"), t, 3 * C);
        attention(&layer, t, C, C / 2), put_all(layer.heads[t], C);
    }
    check("edge", "heads");

    static Episode e[2];
    for (int b = 0; b < 2; b++) {
        e[b].row.p = 1, e[b].row.n = 9;
        take(e[b].advantage, array("edge", "advantages"), b, 8);
    }
    whiten(e, 2), put_all(e[0].white, 8), put_all(e[1].white, 8), check("edge", "white");
}

static void optimizer_file(void) {
    Model m = {.tensors = 0};
    const char *names[] = {"matrix", "vector"};
    double history[2][3][5 * 12], norms[5];
    add_tensor(&m, 3, 4), add_tensor(&m, 4, 0);
    for (int k = 0; k < 2; k++)
        take(m.tensor[k].w, array("optimizer", names[k]), 0, m.tensor[k].size);
    set.weight_decay = 0.3;
    for (int s = 0; s < 5; s++) {
        for (int k = 0; k < 2; k++)
            take(m.tensor[k].g, array("optimizer", k ? "grads.vector" : "grads.matrix"), s,
                 m.tensor[k].size);
        norms[s] = step(&m, 0.1);
        for (int k = 0; k < 2; k++)
            for (int i = 0, n = m.tensor[k].size; i < n; i++) {
                history[k][0][s * n + i] = m.tensor[k].w[i];
                history[k][1][s * n + i] = m.tensor[k].m[i];
                history[k][2][s * n + i] = m.tensor[k].v[i];
            }
    }
    for (int k = 0; k < 2; k++)
        for (int part = 0; part < 3; part++) {
            for (int i = 0; i < 5 * m.tensor[k].size; i++) put(history[k][part][i]);
            check("optimizer", "%s.%s", part == 0 ? "weights" : part == 1 ? "m" : "v", names[k]);
        }
    for (int s = 0; s < 5; s++) put(norms[s]);
    check("optimizer", "norms");
}

int main(int words, char **word) {
    folder = words > 1 ? word[1] : ".";
    set.weight_decay = 0.1, set.grad_clip = 1.5, set.adam_eps = 1e-5, set.beta = 0.3;
    set.temperature = 0.7, set.no_eos_score = -1, set.gamma = 0.95, set.gae_lambda = 0.9;
    set.clip_eps = 0.2, set.vf_clip = 0.2;
    Model policy = load("policy", 0), ref = load("ref", 0);
    Model reward_model = load("reward_model", 1), value_model = load("value_model", 1);
    load_rows();
    batch_file(&policy);
    sample_file(&policy);
    sft_file(&policy);
    double shift = rm_file(&reward_model);
    dpo_file(&policy, &ref);
    ppo_file(&policy, &ref, &value_model, &reward_model, shift);
    edge_file();
    optimizer_file();
    printf("%d arrays compared, %d differ\n", checked, failures);
    return failures > 0;
}
